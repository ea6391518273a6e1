"""The operator traced, compiled and scripted: shapes decide, values are never looked at."""
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from fadc_timm.ops import adaptive_dilated_conv2d, deform_conv2d, list_backends, set_backend
from fadc_timm.ops.sampled_conv.scripted import scripted_conv2d
from tests.support import cases
from tests.support.cases import GAINS, OpCase
from tests.support.marks import needs_torch_2_11
from tests.support.op_checks import BACKEND_NAMES, CASE, check, ids, skip_unless_runs

pytestmark = pytest.mark.usefixtures('one_thread')

TRACED = [CASE['everything'], CASE['depthwise'], CASE['dilation_groups_across'], CASE['offset_rectangular'],
          CASE['offset_depthwise']]


@pytest.mark.parametrize('case', [*TRACED, CASE['stride2'], CASE['out_larger'], CASE['batch0_depthwise']], ids=ids)
@pytest.mark.parametrize('backend', [None, *list_backends()])
def test_meta(backend, case):
    inputs = cases.make_inputs(case, torch.float32, device='meta')
    if backend is not None:
        skip_unless_runs(case, inputs, backend)
    results = cases.results(case, inputs, backend)
    assert results['out'].shape == (case.x[0], case.o, *case.out_size)
    assert all(t.device.type == 'meta' for t in results.values())
    assert all(results[name].shape == t.shape for name, t in inputs.items())


@pytest.mark.parametrize('case', TRACED, ids=ids)
@pytest.mark.parametrize('backend', [None, *list_backends()])
def test_fake_tensors(backend, case):
    real = cases.make_inputs(case, torch.float32)
    with FakeTensorMode():
        inputs = {name: torch.empty(t.shape, requires_grad=True) for name, t in real.items()}
        if backend is not None:
            skip_unless_runs(case, inputs, backend)
        y = cases.call(case, inputs, backend)
        grads = torch.autograd.grad(y, list(inputs.values()), torch.empty_like(y))
    assert y.shape == (case.x[0], case.o, *case.out_size) and y.is_contiguous() and y.device.type == 'cpu'
    assert [g.shape for g in grads] == [t.shape for t in inputs.values()]


@pytest.mark.parametrize('backend, case', [
    ('reference', CASE['k1']),
    *((name, case) if case.name in ('everything', 'offset_rectangular') or name == 'gather'
      else pytest.param(name, case, marks=pytest.mark.sweep) for name in BACKEND_NAMES for case in TRACED)], ids=ids)
@pytest.mark.interpreted('everything', 'depthwise', 'offset_rectangular')
def test_compile(backend, case):
    inputs = cases.make_inputs(case, torch.float32)
    skip_unless_runs(case, inputs, backend)
    torch.compiler.reset()
    compiled = torch.compile(cases.call, fullgraph=True, backend='aot_eager')
    y = compiled(case, inputs, backend)
    grads = torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))
    actual = {'out': y.detach(), **dict(zip(inputs, grads))}
    check(case, inputs, actual, cases.oracle(case, torch.float32), torch.float32)


@pytest.mark.parametrize('spacing', [None, (1, 1)], ids=['dilation', 'offset'])
@pytest.mark.parametrize('backend, groups', [
    (None, 4), *(pytest.param(name, 1, marks=pytest.mark.sweep) for name in BACKEND_NAMES)])
@pytest.mark.interpreted('dilation')
def test_compile_any_size(backend, groups, spacing):
    """One graph serves every batch and size."""
    # none of the sizes is another's, or 9, the number of taps: the graph would be made for that
    sizes = [OpCase(f'any_size_{i}', (2 + i, 4, 7 + i, 11 + 2 * i), 4, groups=groups, spacing=spacing)
             for i in range(3)]
    torch.compiler.reset()
    counter = CompileCounter()

    operator = adaptive_dilated_conv2d if spacing is None else deform_conv2d

    def run(x, weight, positions, mask, bias, *gains):
        return operator(
            x, weight, positions, mask, bias, gains=gains, padding=1, groups=groups, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for case in sizes:
        inputs = cases.make_inputs(case, torch.float32)
        if backend is not None:
            skip_unless_runs(case, inputs, backend)
        expected = cases.oracle(case, torch.float32)['out']
        assert cases.error(compiled(*inputs.values()).detach(), expected) <= cases.tolerance('out', torch.float32)
    assert counter.frame_count == 1


class Deformable(torch.nn.Module):
    """DCNv2: offsets and mask predicted from the map."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
        self.predict = torch.nn.Conv2d(4, 27, 3, stride=2, padding=1)

    def forward(self, x):
        o = self.predict(x)
        return deform_conv2d(x, self.weight, o[:, :18], 2 * torch.sigmoid(o[:, 18:]), stride=2, padding=1)


@needs_torch_2_11
def test_export_any_size():
    """The exported graph has torch's own operators alone, and takes every batch and size."""
    model = Deformable()
    dims = {0: torch.export.Dim('b', min=1, max=64), 2: torch.export.Dim('h', min=4, max=512),
            3: torch.export.Dim('w', min=4, max=512)}
    program = torch.export.export(model, (torch.randn(2, 4, 16, 20),), dynamic_shapes=(dims,))
    called = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert not any('fadc_timm' in name or 'torchvision' in name for name in called)
    for shape in ((2, 4, 16, 20), (1, 4, 7, 9), (5, 4, 33, 18)):
        x = torch.randn(shape)
        with set_backend('grid_sample'):
            expected = model(x).detach()
        # the graph rounds positions in another order
        assert cases.error(program.module()(x).detach(), expected.double()) < 2e-6  # 1.1e-6


@pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize('name', [
    'everything', 'plain', 'only_mask', 'stride2', 'groups2', 'depthwise', 'dilation_groups2', 'offset', 'offset_plain',
    'offset_k5', 'offset_groups2', 'offset_depthwise'])
def test_script(name, dtype):
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype)
    y = torch.jit.script(scripted_conv2d)(
        inputs['x'], inputs['weight'], inputs[case.source], inputs.get('mask'), inputs.get('bias'),
        tuple(inputs.get(gain) for gain in GAINS), case.stride[0], case.k // 2, case.groups,
        case.spacing and case.spacing[0])
    grads = torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))
    check(case, inputs, {'out': y.detach(), **dict(zip(inputs, grads))}, cases.oracle(case, dtype), dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=ids)
@pytest.mark.parametrize('name', [
    'gains', 'plain', 'batch0', 'dilation_groups_across', 'depthwise', 'stride2', 'offset', 'offset_rectangular',
    'offset_depthwise', 'offset_batch0'])
def test_opcheck_sampled_conv2d(name, dtype):
    """Schema, fake kernel and autograd formula of the operator behind `gather`."""
    case = CASE[name]
    inputs = cases.make_inputs(case, dtype)
    gains = [inputs.get(name) for name in GAINS]
    split = any(g is not None for g in gains)
    options = cases.checked(case, inputs).geometry()
    operator, backward = torch.ops.fadc_timm.sampled_conv2d, torch.ops.fadc_timm.sampled_conv2d_backward
    # in half precision the graph that is made may round in another order
    tests = {} if dtype == torch.float32 else {'test_utils': ('test_schema', 'test_faketensor')}
    weights = [inputs['weight']]
    if not split:
        weights.append(inputs['weight'].expand(case.x[0], *inputs['weight'].shape))
    for weight in weights:
        args = (inputs['x'], inputs[case.source], inputs.get('mask'), weight.detach().requires_grad_(),
                inputs.get('bias'), *gains, split, gains[3] is not None, *options)
        torch.library.opcheck(operator, args, **tests)
        x, positions, mask, weight, bias, *rest = (a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        y, high = operator(x, positions, mask, weight, bias, *rest)
        rest.pop(5)
        torch.library.opcheck(backward, (torch.randn_like(y), high, x, positions, mask, weight, *rest), **tests)
