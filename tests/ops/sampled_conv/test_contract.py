"""The operator's contract: its defaults, the choice of the backend, and what it refuses."""
import pytest
import torch
from torch.utils._pytree import tree_map

from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d, list_backends, set_backend
from fadc_timm.ops.sampled_conv import backends
from fadc_timm.ops.settings import named_backend
from tests.support import cases
from tests.support.cases import GAINS, OpCase
from tests.support.marks import has_old_triton
from tests.support.op_checks import CASE, skip_unless_runs

pytestmark = pytest.mark.usefixtures('one_thread')


def valid():
    """x (2, 4, 5, 7), weight (6, 4, 3, 3), dilation (2, 2, 5, 7), mask (2, 18, 5, 7), bias (6,) and all gains."""
    case = OpCase('valid', (2, 4, 5, 7), 6, dilation_groups=2)
    inputs = {name: t.detach() for name, t in cases.make_inputs(case, torch.float32).items()}
    gains = [inputs.pop(name) for name in GAINS]
    return {**inputs, 'gains': gains}


def gain(i, t):
    """The valid gains with one replaced."""
    gains = valid()['gains']
    gains[i] = t
    return {'gains': gains}


def on_meta():
    return tree_map(lambda t: t.to('meta'), valid())


# defaults, choice of the backend


@pytest.mark.parametrize('name', ['everything', 'plain', 'depthwise', 'offset', 'offset_depthwise'])
def test_backend_none_is_the_chosen_one(name):
    case = CASE[name]
    inputs = cases.make_inputs(case, torch.float32)
    chosen = backends.choose_backend(cases.checked(case, inputs))
    assert chosen != 'reference' and not cases.why_not(case, inputs, chosen)
    assert cases.call(case, inputs, None).equal(cases.call(case, inputs, chosen))


def test_set_backend(monkeypatch):
    """Before the environment, which comes before the device; in a block until its end, and otherwise for good."""
    seen = []
    for name in ('gather', 'grid_sample', 'torchvision', 'reference'):
        monkeypatch.setitem(backends.BACKENDS, name, backends.BACKENDS[name]._replace(
            forward=lambda case, name=name: seen.append(name) or torch.zeros(1)))

    def used(**kwargs):
        adaptive_dilated_conv2d(**valid(), **kwargs)
        return seen.pop()

    assert used() == 'gather'
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'grid_sample')
    assert used() == 'grid_sample'
    with set_backend('torchvision'):
        assert used() == 'torchvision' and used(backend='gather') == 'gather'
        with set_backend(None):
            assert used() == 'grid_sample'
        assert used() == 'torchvision'
    assert used() == 'grid_sample'
    set_backend('reference')
    assert used() == 'reference'
    set_backend(None)
    monkeypatch.setenv('FADC_TIMM_BACKEND', '')
    assert used() == 'gather'


def test_set_backend_twice():
    """An object's blocks follow each other or are nested, and each ends with what was set before it."""
    block = set_backend('gather')
    for _ in range(2):
        with block, set_backend('grid_sample'), block:
            assert named_backend() == 'gather'
        assert named_backend() is None


def test_set_backend_that_is_none(monkeypatch):
    with pytest.raises(ValueError, match="'cudnn'.*reference, gather"):
        set_backend('cudnn')
    monkeypatch.setenv('FADC_TIMM_BACKEND', 'cudnn')
    with pytest.raises(ValueError, match="FADC_TIMM_BACKEND is 'cudnn'.*reference, gather"):
        adaptive_dilated_conv2d(**valid())


def test_set_backend_does_not_fall_back():
    with set_backend('torchvision'), pytest.raises(NotImplementedError, match="'torchvision'.*meta"):
        adaptive_dilated_conv2d(**on_meta())


def test_set_backend_is_compiled():
    """Another setting is another graph."""
    torch.compiler.reset()
    kwargs = valid()
    compiled = torch.compile(lambda: adaptive_dilated_conv2d(**kwargs), fullgraph=True, backend='aot_eager')
    expected = adaptive_dilated_conv2d(**kwargs, backend='gather')
    assert torch.equal(compiled(), expected)
    with set_backend('grid_sample'):
        assert torch.equal(compiled(), adaptive_dilated_conv2d(**kwargs, backend='grid_sample'))
    assert torch.equal(compiled(), expected)


@pytest.mark.parametrize('backend', list_backends())
def test_integers_stand_for_pairs(backend):
    case = OpCase('pairs', (2, 4, 7, 9), 6, stride=(2, 2), padding=(1, 1))
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    args = [inputs[name] for name in ('x', 'weight', 'dilation', 'mask', 'bias')]
    y = cases.call(case, {**inputs, **dict.fromkeys(GAINS)}, backend)
    for kwargs in ({'padding': 1}, {'padding': [1, 1], 'gains': [None] * 4}, {}):
        assert adaptive_dilated_conv2d(*args, stride=2, **kwargs, backend=backend).equal(y)
    assert adaptive_dilated_conv2d(*args, stride=[2, 2], backend=backend).equal(y)


@pytest.mark.parametrize('backend', list_backends())
def test_offset_defaults(backend):
    """Those of a convolution: no padding, and integers stand for pairs."""
    case = OpCase('pairs', (2, 4, 7, 9), 6, padding=(0, 0), spacing=(1, 1), use=())
    inputs = cases.make_inputs(case, torch.float64)
    skip_unless_runs(case, inputs, backend)
    tensors = inputs['x'], inputs['weight'], inputs['offset']
    y = cases.call(case, inputs, backend)
    for kwargs in ({}, {'stride': 1, 'padding': 0, 'dilation': 1}, {'padding': [0, 0], 'dilation': [1, 1]}):
        assert deform_conv2d(*tensors, **kwargs, gains=[None] * 4, backend=backend).equal(y)


# bad input


ones = torch.ones
BAD = {
    'x_no_tensor': ({'x': [[1.]]}, TypeError, ('x must be a tensor', '(B, C, H, W)', 'list')),
    'x_rank3': ({'x': ones(4, 5, 7)}, ValueError, ('(4, 5, 7)', '(B, C, H, W)')),
    'x_rank5': ({'x': ones(2, 4, 1, 5, 7)}, ValueError, ('(2, 4, 1, 5, 7)', '(B, C, H, W)')),
    'x_int': ({'x': ones(2, 4, 5, 7, dtype=torch.int64)}, TypeError, ('int64', 'floating point')),
    'x_complex': ({'x': ones(2, 4, 5, 7, dtype=torch.complex64)}, TypeError, ('complex64', 'floating point')),
    'x_channels': ({'x': ones(2, 5, 5, 7)}, ValueError, ('(6, 4, 3, 3)', '(any, 5, any, any)', '(O, C/groups, k, k)')),
    'x_no_rows': ({'x': ones(2, 4, 0, 7)}, ValueError, ('(2, 4, 0, 7)', 'at least one pixel')),
    'x_no_channels': ({'x': ones(2, 0, 5, 7)}, ValueError, ('(2, 0, 5, 7)', 'must have a channel')),
    'weight_no_outputs': ({'weight': ones(0, 4, 3, 3)}, ValueError, ('(0, 4, 3, 3)', 'must have an output channel')),
    'x_batch': ({'x': ones(3, 4, 5, 7)}, ValueError, ('(2, 2, 5, 7)', '(3, any, any, any)', "(B, G, H', W')")),
    'weight_no_tensor': ({'weight': 1.}, TypeError, ('weight must be a tensor', '(O, C/groups, k, k)', 'float')),
    'weight_none': ({'weight': None}, TypeError, ('weight must be a tensor', '(O, C/groups, k, k)', 'NoneType')),
    'weight_rank': ({'weight': ones(6, 4, 3)}, ValueError, ('(6, 4, 3)', '(any, 4, any, any)')),
    'weight_channels': ({'weight': ones(6, 2, 3, 3)}, ValueError, ('(6, 2, 3, 3)', '(any, 4, any, any)')),
    'weight_groups': ({'groups': 2}, ValueError, ('(6, 4, 3, 3)', '(any, 2, any, any)', '(O, C/groups, k, k)')),
    'weight_even': ({'weight': ones(6, 4, 2, 2)}, ValueError, ('(6, 4, 2, 2)', '(O, C/groups, k, k)', 'odd')),
    'weight_not_square': ({'weight': ones(6, 4, 3, 5)}, ValueError,
                          ('(6, 4, 3, 5)', '(O, C/groups, k, k)', 'one kernel size')),
    'weight_dtype': ({'weight': ones(6, 4, 3, 3).double()}, TypeError, ('weight', 'float64', 'float32')),
    'weight_device': ({'weight': ones(6, 4, 3, 3, device='meta')}, ValueError, ('weight', 'meta', 'cpu', 'one device')),
    'groups_zero': ({'groups': 0}, ValueError, ('groups', 'positive integer', '0')),
    'groups_float': ({'groups': 2.}, ValueError, ('groups', 'positive integer', '2.0')),
    'groups_of_x': ({'groups': 3}, ValueError, ('groups=3', 'does not divide', '4 channels', '(2, 4, 5, 7)')),
    'groups_of_weight': ({'groups': 4, 'weight': ones(6, 1, 3, 3)}, ValueError,
                         ('groups=4', 'does not divide', '6 output channels', '(6, 1, 3, 3)')),
    'dilation_number': ({'dilation': 2}, TypeError, ('dilation must be a tensor', "(B, G, H', W')", 'int')),
    'dilation_rank': ({'dilation': ones(2, 5, 7)}, ValueError, ('(2, 5, 7)', '(2, any, any, any)', "(B, G, H', W')")),
    'dilation_batch': ({'dilation': ones(1, 2, 5, 7)}, ValueError, ('(1, 2, 5, 7)', '(2, any, any, any)')),
    'dilation_groups': ({'dilation': ones(2, 3, 5, 7)}, ValueError, ('(2, 3, 5, 7)', '3 groups', '4 channels')),
    'dilation_no_groups': ({'dilation': ones(2, 0, 5, 7)}, ValueError, ('(2, 0, 5, 7)', '0 groups', '4 channels')),
    'dilation_no_columns': ({'dilation': ones(2, 2, 5, 0)}, ValueError, ('(2, 2, 5, 0)', 'at least one position')),
    'dilation_dtype': ({'dilation': ones(2, 2, 5, 7).double()}, TypeError, ('dilation', 'float64', 'float32')),
    'dilation_half': ({'dilation': ones(2, 2, 5, 7).half()}, TypeError, ('dilation', 'float16', 'float32')),
    'dilation_device': ({'dilation': ones(2, 2, 5, 7, device='meta')}, ValueError, ('dilation', 'meta', 'cpu')),
    'mask_number': ({'mask': 1.}, TypeError, ('mask must be a tensor', "(B, G*k*k, H', W')", 'float')),
    'mask_rank': ({'mask': ones(2, 2, 9, 5, 7)}, ValueError,
                  ('(2, 2, 9, 5, 7)', '(2, 18, 5, 7)', "(B, G*k*k, H', W')")),
    'mask_batch': ({'mask': ones(1, 18, 5, 7)}, ValueError, ('(1, 18, 5, 7)', '(2, 18, 5, 7)')),
    'mask_channels': ({'mask': ones(2, 9, 5, 7)}, ValueError, ('(2, 9, 5, 7)', '(2, 18, 5, 7)', "(B, G*k*k, H', W')")),
    'mask_size': ({'mask': ones(2, 18, 5, 6)}, ValueError, ('(2, 18, 5, 6)', '(2, 18, 5, 7)')),
    'mask_dtype': ({'mask': ones(2, 18, 5, 7).bfloat16()}, TypeError, ('mask', 'bfloat16', 'float32')),
    'mask_device': ({'mask': ones(2, 18, 5, 7, device='meta')}, ValueError, ('mask', 'meta', 'cpu')),
    'bias_number': ({'bias': 0.}, TypeError, ('bias must be a tensor', '(O,)', 'float')),
    'bias_size': ({'bias': ones(4)}, ValueError, ('(4,)', '(O,) = (6)')),
    'bias_rank': ({'bias': ones(1, 6, 1, 1)}, ValueError, ('(1, 6, 1, 1)', '(O,) = (6)')),
    'bias_dtype': ({'bias': ones(6).double()}, TypeError, ('bias', 'float64', 'float32')),
    'gains_three': ({'gains': valid()['gains'][:3]}, ValueError, ('four', '(low_in, low_out, high_in, high_out)', '3')),
    'gains_tensor': ({'gains': ones(4, 2, 4)}, TypeError, ('four', '(low_in, low_out, high_in, high_out)', 'Tensor')),
    'gains_number': (gain(1, 2.), TypeError, ('low_out must be a tensor', '(B, O)', 'float')),
    'gains_low_in': (gain(0, ones(2, 6)), ValueError, ('low_in', '(2, 6)', '(B, C) = (2, 4)')),
    'gains_low_out': (gain(1, ones(2, 4)), ValueError, ('low_out', '(2, 4)', '(B, O) = (2, 6)')),
    'gains_high_in_rank': (gain(2, ones(2, 4, 1, 1)), ValueError, ('high_in', '(2, 4, 1, 1)', '(B, C) = (2, 4)')),
    'gains_high_out_batch': (gain(3, ones(1, 6)), ValueError, ('high_out', '(1, 6)', '(B, O) = (2, 6)')),
    'gains_dtype': (gain(3, ones(2, 6).double()), TypeError, ('high_out', 'float64', 'float32')),
    'gains_device': (gain(0, ones(2, 4, device='meta')), ValueError, ('low_in', 'meta', 'cpu')),
    'stride_zero': ({'stride': 0}, ValueError, ('stride', 'at least 1', '0')),
    'stride_float': ({'stride': 1.5}, TypeError, ('stride', 'integer or a pair', '1.5')),
    'stride_three': ({'stride': (1, 1, 1)}, TypeError, ('stride', 'integer or a pair', '(1, 1, 1)')),
    'stride_tensor': ({'stride': torch.tensor(2)}, TypeError, ('stride', 'integer or a pair')),
    'padding_same': ({'padding': 'same'}, TypeError, ('padding', 'integer or a pair', 'same')),
    'padding_half_none': ({'padding': (1, None)}, TypeError, ('padding', 'integer or a pair', '(1, None)')),
    'padding_dict': ({'padding': {}}, TypeError, ('padding', 'integer or a pair', '{}')),
    'backend_unknown': ({'backend': 'cudnn'}, ValueError, ("'cudnn'", *list_backends())),
    'backend_cannot': ({**on_meta(), 'backend': 'torchvision'}, NotImplementedError, ("'torchvision'", 'meta')),
}


@pytest.mark.parametrize('overrides, exception, fragments', BAD.values(), ids=BAD)
def test_bad_input(overrides, exception, fragments):
    with pytest.raises(exception) as raised:
        adaptive_dilated_conv2d(**{**valid(), **overrides})
    message = str(raised.value)
    assert all(fragment in message for fragment in fragments), message


def valid_offset():
    """As :func:`valid`, with an offset (2, 36, 5, 7)."""
    kwargs = {**valid(), 'offset': torch.zeros(2, 36, 5, 7), 'padding': 1}
    del kwargs['dilation']
    return kwargs


BAD_OFFSET = {
    'x_rank3': BAD['x_rank3'], 'weight_groups': BAD['weight_groups'], 'weight_not_square': BAD['weight_not_square'],
    'mask_channels': BAD['mask_channels'], 'mask_size': BAD['mask_size'], 'bias_size': BAD['bias_size'],
    'gains_three': BAD['gains_three'], 'gains_low_in': BAD['gains_low_in'], 'stride_zero': BAD['stride_zero'],
    'padding_same': BAD['padding_same'], 'backend_unknown': BAD['backend_unknown'],
    'padding_none': ({'padding': None}, TypeError, ('padding', 'integer or a pair', 'None')),
    'padding_negative': ({'padding': -1}, ValueError, ('padding', 'at least 0', '-1')),
    'dilation_zero': ({'dilation': 0}, ValueError, ('dilation', 'at least 1', '0')),
    'dilation_tensor': ({'dilation': ones(2, 2, 5, 7)}, TypeError, ('dilation', 'integer or a pair')),
    'too_small': ({'dilation': (4, 1)}, ValueError, ('size (-1, 7)', '(2, 4, 5, 7)', 'dilation=(4, 1)', '(1, 1)')),
    'offset_none': ({'offset': None}, TypeError, ('offset must be a tensor', "(B, G*k*k*2, H', W')", 'NoneType')),
    'offset_rank': ({'offset': ones(2, 5, 7)}, ValueError, ('(2, 5, 7)', '(2, any, 5, 7)', "(B, G*k*k*2, H', W')")),
    'offset_batch': ({'offset': ones(1, 36, 5, 7)}, ValueError, ('(1, 36, 5, 7)', '(2, any, 5, 7)')),
    'offset_size': ({'offset': ones(2, 36, 5, 6)}, ValueError, ('(2, 36, 5, 6)', '(2, any, 5, 7)')),
    'offset_size_of_padding': ({'padding': 0}, ValueError, ('(2, 36, 5, 7)', '(2, any, 3, 5)')),
    'offset_channels': ({'offset': ones(2, 35, 5, 7)}, ValueError, ('(2, 35, 5, 7)', 'multiple of 18 channels')),
    'offset_no_channels': ({'offset': ones(2, 0, 5, 7)}, ValueError, ('(2, 0, 5, 7)', 'multiple of 18 channels')),
    'offset_groups': ({'offset': ones(2, 54, 5, 7)}, ValueError, ('(2, 54, 5, 7)', '3 groups', '4 channels')),
    'offset_dtype': ({'offset': ones(2, 36, 5, 7).double()}, TypeError, ('offset', 'float64', 'float32')),
    'offset_half': ({'offset': ones(2, 36, 5, 7).half()}, TypeError, ('offset', 'float16', 'float32')),
    'offset_device': ({'offset': ones(2, 36, 5, 7, device='meta')}, ValueError, ('offset', 'meta', 'cpu')),
}


@pytest.mark.parametrize('overrides, exception, fragments', BAD_OFFSET.values(), ids=BAD_OFFSET)
def test_bad_offset(overrides, exception, fragments):
    with pytest.raises(exception) as raised:
        deform_conv2d(**{**valid_offset(), **overrides})
    message = str(raised.value)
    assert all(fragment in message for fragment in fragments), message


@pytest.mark.parametrize('name', [
    'x_no_tensor', 'x_int', 'weight_none', 'weight_even', 'dilation_number', 'mask_number', 'gains_three',
    'gains_number'])
def test_bad_input_under_autocast(name):
    """The casts come before the checks and do not stumble over what these will find."""
    with torch.autocast('cpu', torch.bfloat16):
        test_bad_input(*BAD[name])


def test_the_valid_call_is_valid():
    """The bad calls differ from this one in one argument."""
    for backend in (None, *list_backends()):
        if backend == 'triton' and has_old_triton:
            continue
        assert adaptive_dilated_conv2d(**valid(), backend=backend).shape == (2, 6, 5, 7)
        assert deform_conv2d(**valid_offset(), backend=backend).shape == (2, 6, 5, 7)
