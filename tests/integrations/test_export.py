"""Exported networks: torch.export, ONNX, and quantisation of an exported graph."""
import copy
import time

import pytest
import torch

from fadc_timm import FADConv2d
from fadc_timm.layers.onnx_capture import _KEEPS_CONSTANTS
from fadc_timm.ops import adaptive_dilated_conv2d
from tests.support.backbones import create_fadc, photos
from tests.support.cases import error
from tests.support.integration_cases import models, one_model, uses
from tests.support.marks import needs_any_size, needs_is_exporting, needs_torch_2_11
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


MOST_NODES = 60  # of a layer in an ONNX file
MOST_TABLE_NODES = 120  # of the tables of a symbolic size


def dynamic(step=1):
    height, width = (torch.export.Dim(name, min=-(-33 // step)) for name in ('height', 'width'))
    height, width = (d if step == 1 else step * d for d in (height, width))
    return ({0: torch.export.Dim('batch', max=1024), 2: height, 3: width},)


# the last stage alone: each layer costs a second
LAST = dict(fadc_stages=(False, False, False, True), num_classes=10)
STAGES = [LAST, pytest.param(dict(num_classes=10), marks=pytest.mark.sweep)]
stages = pytest.mark.parametrize('stages', STAGES, ids=['last', 'all'])
SIZES = (64, 2), (97, 3), (160, 1)  # of the image, images


@uses('torch', 'torch.export: any batch, any multiple of 32')
@needs_is_exporting
@one_model
@stages
@torch.no_grad()
def test_export(stages, name):
    """Multiples of 32, as test_resnet, the plain one too, has downsampling that pads other sizes."""
    model = create_fadc(name, **stages)
    exported = torch.export.export(model, (photos()[:2],), dynamic_shapes=dynamic(32))
    assert not any('fadc_timm' in str(node.target) for node in exported.graph.nodes)  # runs without this package
    program = exported.module()
    for x in (photos()[:2], photos(96)[:3], photos(160)[1:2, :, :, :64]):
        assert error(program(x), model(x).double()) < 1e-5


@needs_torch_2_11
@pytest.mark.parametrize('strict', [pytest.param(False, marks=needs_any_size), True])
def test_export_asks_nothing_about_sizes(strict):
    """A layer and its tables are made for every size, not only for multiples; also where dynamo captures them."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), off_identity(FADConv2d(4, 4, 3, stride=2, padding=1)),
        off_identity(FADConv2d(4, 4, 7, padding=3, groups=4))).eval()
    sizes = {0: torch.export.Dim('batch'), **{i: torch.export.Dim(name, min=5) for i, name in ((2, 'h'), (3, 'w'))}}
    exported = torch.export.export(model, (photos()[:2],), dynamic_shapes=(sizes,), strict=strict)
    for x in (photos()[:2], photos(33)[:3], photos(50)[:4, :, :, :41]):
        assert error(exported.module()(x), model(x).double()) < 1e-5


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == 'call_function']


@pytest.mark.skipif(not _KEEPS_CONSTANTS, reason='torch 2.11 loses the constants of operators that are decomposed')
@torch.no_grad()
def test_onnx_captures_a_layer_as_one_operator(monkeypatch):
    """Unless it writes into its buffers. The exporter writes it out when it decomposes the graph."""
    monkeypatch.setattr(torch.onnx, 'is_in_onnx_export', lambda: True)
    conv, x = off_identity(FADConv2d(4, 6, 3, stride=2, padding=1)), torch.randn(2, 4, 9, 8)
    assert 'fadc_timm.whole_layer.default' not in operators(torch.export.export(conv.train(), (x,)))
    captured = torch.export.export(conv.eval(), (x,))
    assert operators(captured) == ['fadc_timm.whole_layer.default']
    program = captured.run_decompositions({
        op: function for op, function in torch._decomp.decomposition_table.items() if 'fadc_timm' in str(op)})
    assert not any('fadc_timm' in name for name in operators(program))
    assert error(program.module()(x), conv(x).double()) < 1e-5
    assert error(captured.module()(x), conv(x).double()) < 1e-5


class HooksWithin(torch.nn.Module):
    """What holds during a call alone, and a result that a hook took."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        dilations = []
        hook = self.conv.ada_dr.register_forward_hook(lambda module, args, output: dilations.append(output[0]))
        y = self.conv(x)
        hook.remove()
        self.conv.ada_dr.dilation_act = 'zero'
        z = self.conv(x)
        self.conv.ada_dr.dilation_act = 'abs'
        return torch.cat([y, z, copy.copy(self.conv)(x), dilations[0]], 1)


class Mapped(torch.nn.Module):
    """A transform of a layer, and a hook on a part of another that stays."""

    def __init__(self, conv):
        super().__init__()
        self.convs = torch.nn.ModuleList([conv, copy.deepcopy(conv)])
        self.convs[1].freq_select.register_forward_hook(lambda module, args, output: 2 * output)

    def forward(self, x):
        return torch.vmap(self.convs[0])(x[:, None])[:, 0] + self.convs[1](x)


@pytest.mark.parametrize('wrap, backend', [
    (HooksWithin, None), (HooksWithin, 'torchvision'), (HooksWithin, 'reference'), (Mapped, None)])
@torch.no_grad()
def test_onnx_of_layers_in_other_states(wrap, backend, tmp_path):
    """The file says what a layer was when it was called."""
    conv, x = off_identity(FADConv2d(4, 4, 3, padding=1, backend=backend)).eval(), torch.randn(2, 4, 9, 8)
    model = wrap(conv).eval()
    to_onnx(model, tmp_path / 'model.onnx', x)
    assert (run(tmp_path / 'model.onnx')(x) - model(x)).abs().max() < 1e-4


@torch.no_grad()
def test_captured_layers_are_of_one_process():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with pytest.raises(RuntimeError, match='captured layer 1 is not in this process'):
        torch.ops.fadc_timm.whole_layer(x, [weight], 1)


@torch.no_grad()
def test_onnx_can_be_verified():
    """The exporter's `verify=True` compares the file with its program, which computes what the layer does."""
    pytest.importorskip('onnxscript')
    conv, x = off_identity(FADConv2d(4, 4, 3, padding=1)).eval(), torch.randn(2, 4, 9, 8)
    program = torch.onnx.export(conv, (x,), dynamo=True, verbose=False).exported_program
    assert error(program.module()(x), conv(x).double()) < 1e-5


def to_onnx(model, path, x, opset=20, sizes=None):
    pytest.importorskip('onnxscript')
    torch.onnx.export(
        model, (x,), dynamo=True, opset_version=opset, dynamic_shapes=sizes, verbose=False).save(path)


def to_onnx_by_tracing(model, path, x, opset=17, any_size=False):
    """torch's older exporter."""
    axes = {'x': {0: 'batch', 2: 'height', 3: 'width'}} if any_size else None
    torch.onnx.export(
        model, (x,), str(path), dynamo=False, opset_version=opset, input_names=['x'], dynamic_axes=axes)


def run(path):
    """The file as a function, in onnxruntime."""
    onnxruntime = pytest.importorskip('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    feed = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {feed: x.numpy()})[0])


def seconds(f):
    f()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


@uses('onnxruntime', "ONNX by torch's exporter, opset 20: any batch and size, within 1e-4, at most 3x eager's time")
@one_model
@stages
@torch.no_grad()
def test_onnx(stages, name, tmp_path):
    onnx = pytest.importorskip('onnx')
    model, path = create_fadc(name, **stages), tmp_path / 'model.onnx'
    to_onnx(model, path, photos()[:2], sizes=dynamic())
    onnx.checker.check_model(onnx.load(path), full_check=True)
    exported = run(path)
    for size, images in SIZES:
        x = photos(size)[:images]
        assert (exported(x) - model(x)).abs().max() < 1e-4  # 5.2e-7
    times = seconds(lambda: exported(x)), seconds(lambda: model(x))
    assert times[0] < 3 * times[1], times  # 0.4 to 0.7 of it


@pytest.mark.filterwarnings('ignore')
@models
@pytest.mark.parametrize('opset', [16, *(pytest.param(n, marks=pytest.mark.sweep) for n in (17, 18, 19))])
@torch.no_grad()
def test_onnx_by_tracing(opset, name, tmp_path):
    pytest.importorskip('onnx')
    model = create_fadc(name, **LAST)
    for any_size in (False, True):
        path = tmp_path / f'{any_size}.onnx'
        to_onnx_by_tracing(model, path, photos()[:2], opset, any_size)
        for size, images in SIZES if any_size else SIZES[:1]:
            x = photos(size)[:images]
            assert (run(path)(x) - model(x)).abs().max() < 1e-4


GROUPS = [dict(spatial_group=2), dict(groups=8, dilation_groups=2), *(
    pytest.param(kind, marks=pytest.mark.sweep) for kind in (
        dict(dilation_groups=2), dict(dilation_groups=4, spatial_group=8), dict(sampling='deform', offset_groups=2),
        dict(sampling='fixed', spatial_group=2)))]


@pytest.mark.parametrize('kind', GROUPS)
@torch.no_grad()
def test_groups_by_tracing(kind, tmp_path):
    """The older exporter takes the batch for a constant behind some of torch's views."""
    pytest.importorskip('onnx')
    conv, path = off_identity(FADConv2d(8, 8, 3, padding=1, **kind)).eval(), tmp_path / 'model.onnx'
    to_onnx_by_tracing(conv, path, torch.randn(2, 8, 12, 12), any_size=True)
    for batch in (2, 3, 1):
        x = torch.randn(batch, 8, 12, 15)
        assert error(run(path)(x), conv(x).double()) < 2e-5


@pytest.mark.sweep
@models
@pytest.mark.parametrize('opset', range(16, 20))
@torch.no_grad()
def test_opsets(opset, name, tmp_path):
    model, path = create_fadc(name, **LAST), tmp_path / 'model.onnx'
    to_onnx(model, path, photos()[:2], opset, dynamic())
    for size, images in SIZES:
        x = photos(size)[:images]
        assert (run(path)(x) - model(x)).abs().max() < 1e-4


FEW_NODES = [  # kernel, groups, norm, size, any size: of each value one; all of them in the sweep
    (3, 1, 'batchnorm2d', 36, True), (7, 8, 'layernorm2d', 36, False), (3, 1, 'batchnorm2d', 4, False),
    *(pytest.param(*kind, norm, 36, any_size, marks=pytest.mark.sweep) for kind in ((3, 1), (7, 8))
      for norm in ('batchnorm2d', 'layernorm2d') for any_size in (False, True)
      if (*kind, norm, any_size) not in ((3, 1, 'batchnorm2d', True), (7, 8, 'layernorm2d', False)))]


@pytest.mark.parametrize('kernel, groups, norm, size, any_size', FEW_NODES)
@torch.no_grad()
def test_layer_has_few_nodes(kernel, groups, norm, size, any_size, tmp_path):
    """In a viewer a layer is some dozen nodes. Its tables are constants; those of symbolic sizes are made once."""
    onnx = pytest.importorskip('onnx')

    def nodes(layers):
        path = tmp_path / 'model.onnx'
        convs = [FADConv2d(8, 8, kernel, padding=kernel // 2, groups=groups, bias=False, ada_kern_norm=norm)
                 for _ in range(layers)]
        sizes = dynamic() if any_size else None
        to_onnx(torch.nn.Sequential(*convs).eval(), path, torch.randn(2, 8, size, size), sizes=sizes)
        return len(onnx.load(path).graph.node)

    one, two = nodes(1), nodes(2)
    assert two - one <= MOST_NODES  # 48 to 58
    assert one - (two - one) <= (MOST_TABLE_NODES if any_size else 0)  # 115


DEFORM_CONV = [  # of the layer, whether sizes are symbolic
    (dict(groups=1), False), (dict(groups=8, kernel_size=7, padding=3), True),
    *(pytest.param(kind, any_size, marks=pytest.mark.sweep) for kind in (
        dict(groups=2, stride=2), dict(dilation=2, padding=2, bias=False), dict(dilation_groups=2),
        dict(padding_mode='replicate'), dict(padding=0), dict(sampling='deform'), dict(sampling='deform', groups=8),
        dict(sampling='deform', offset_groups=2, modulated=False)) for any_size in (False, True)),
    pytest.param(dict(groups=1), True, marks=pytest.mark.sweep),
    pytest.param(dict(groups=8, kernel_size=7, padding=3), False, marks=pytest.mark.sweep)]


@pytest.mark.parametrize('opset', [20, *(pytest.param(n, marks=pytest.mark.sweep) for n in (19, 22))])
@pytest.mark.parametrize('kind, any_size', DEFORM_CONV)
@torch.no_grad()
def test_deform_conv(kind, any_size, opset, tmp_path):
    """With the backend 'torchvision' a file has ONNX's operator, once in a layer."""
    onnx = pytest.importorskip('onnx')
    kind = dict(kernel_size=3, padding=1) | kind
    conv = off_identity(FADConv2d(8, 8, **kind, backend='torchvision')).eval()
    path, x = tmp_path / 'model.onnx', torch.randn(2, 8, 15, 14)
    sizes = ({0: torch.export.Dim('b', max=64), **{i: torch.export.Dim(n, min=9) for i, n in ((2, 'h'), (3, 'w'))}},)
    to_onnx(conv, path, x, opset, sizes if any_size else None)
    graph = onnx.load(path).graph
    calls = [node.op_type for node in graph.node if node.op_type in ('DeformConv', 'GridSample')]
    assert calls == ['DeformConv']
    assert any_size or len(graph.node) <= MOST_NODES  # 49 to 58
    for size in (x.shape, (3, 8, 11, 20), (1, 8, 33, 9)) if any_size else (x.shape,):
        x = torch.randn(size)
        assert error(run(path)(x), conv(x).double()) < 1e-5  # 1e-6


FEW_PIXELS = [  # of the layer, height and width
    (dict(groups=1), 7), (dict(groups=8, kernel_size=7, padding=3), 8),
    *(pytest.param(kind, 7, marks=pytest.mark.sweep) for kind in (
        dict(groups=2, stride=2), dict(dilation=2, padding=2, bias=False), dict(dilation_groups=2, spatial_group=4),
        dict(padding=0), dict(dilation=4, padding=1), dict(kernel_decompose='none'),
        dict(kernel_decompose='low', lowfreq_att=True), dict(kernel_decompose='high', bands=(2,)),
        dict(sampling='deform'), dict(sampling='deform', groups=8, stride=2),
        dict(sampling='deform', offset_groups=2, dilation=2, padding=2, modulated=False))),
    *(pytest.param(dict(out_channels=40), size, marks=pytest.mark.sweep) for size in (1, 2, 3, 8, 9)),
    pytest.param(dict(padding_mode='replicate'), 5, marks=pytest.mark.sweep)]


@pytest.mark.parametrize('any_batch', [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize('backend', ['grid_sample', pytest.param('torchvision', marks=pytest.mark.sweep)])
@pytest.mark.parametrize('kind, size', FEW_PIXELS)
@torch.no_grad()
def test_few_pixels(kind, size, backend, any_batch, tmp_path):
    """On few pixels bands and samples are products with matrices."""
    onnx = pytest.importorskip('onnx')
    kind = dict(out_channels=8, kernel_size=3, padding=1) | kind
    conv = off_identity(FADConv2d(8, **kind, backend=backend)).eval()
    path, x = tmp_path / 'model.onnx', torch.randn(2, 8, size, size)
    to_onnx(conv, path, x, sizes=({0: torch.export.Dim('b', max=64)},) if any_batch else None)
    nodes = onnx.load(path).graph.node
    samples = [node.op_type for node in nodes if node.op_type in ('DeformConv', 'GridSample')]
    assert len(samples) == (size > 8) and len(nodes) <= MOST_NODES + (conv.bias is not None)
    for batch in (2, 3, 1) if any_batch else (2,):
        x = torch.randn(batch, 8, size, size)
        assert error(run(path)(x), conv(x).double()) < 1e-5


@torch.no_grad()
def test_deform_conv_of_negative_padding(tmp_path):
    """A layer whose samples start within the map: not one operator, and no convolution of the same size."""
    conv = off_identity(FADConv2d(4, 4, 3, dilation=3, padding=1, backend='torchvision')).eval()
    x = torch.randn(2, 4, 12, 12)
    to_onnx(conv, tmp_path / 'model.onnx', x)
    assert error(run(tmp_path / 'model.onnx')(x), conv(x).double()) < 1e-5


@pytest.mark.parametrize('groups', [1, 4])
@torch.no_grad()
def test_exported_torchvision_of_any_values(groups):
    """Positions that are no numbers, or far away, and no images: torchvision's kernels would read anywhere."""
    conv = off_identity(FADConv2d(4, 4, 3, padding=1, groups=groups, freq_select=False, backend='torchvision')).eval()
    for x in (torch.randn(2, 4, 20, 20), torch.randn(0, 4, 20, 20)):
        program = torch.export.export(conv, (x,)).module()
        assert program(x).shape == x.shape
        for value in (1e30, float('inf'), float('nan')):
            x[:1, 0, 5:9, 5:9] = value
            torch.testing.assert_close(program(x), conv(x), equal_nan=True)


@torch.no_grad()
def test_gains_of_zero(tmp_path):
    """The gains that scale the map before it is sampled are taken out of the total again, without a division by 0."""
    conv = off_identity(FADConv2d(4, 28, 3, padding=1)).eval()  # not one kernel for each image
    conv.ada_kern.high.bias[:2] = -torch.tensor([50., 200.])  # 2 * sigmoid: 4e-22, 0
    x = torch.randn(2, 4, 9, 9)
    exported = torch.export.export(conv, (x,)).module()
    assert error(exported(x), conv(x).double()) < 1e-5
    to_onnx(conv, tmp_path / 'model.onnx', x)
    assert error(run(tmp_path / 'model.onnx')(x), conv(x).double()) < 1e-5  # 3e-7


class Gained(torch.nn.Module):
    """The operator with gains of one's own."""

    def forward(self, x, weight, dilation, high_in):
        return adaptive_dilated_conv2d(x, weight, dilation, gains=(None, None, high_in, None), padding=1)


@pytest.mark.parametrize('outputs', [4, 20])  # with a kernel for each image, and without
@torch.no_grad()
def test_gains_of_any_sign(outputs):
    tensors = torch.randn(2, 3, 7, 7), torch.randn(outputs, 3, 3, 3), torch.rand(2, 1, 7, 7) + 1
    high_in = torch.tensor([[-1.5, 0., 0.7], [-0.2, 1., -0.]])
    exported = torch.export.export(Gained(), (*tensors, high_in)).module()
    assert error(exported(*tensors, high_in), Gained()(*tensors, high_in).double()) < 1e-5


@uses('openvino', 'reads the ONNX file, within 1e-4; any batch and size too')
@models
@pytest.mark.parametrize('any_size', [False, pytest.param(True, marks=pytest.mark.sweep)])
@torch.no_grad()
def test_openvino(any_size, name, tmp_path):
    openvino = pytest.importorskip('openvino')
    model, path = create_fadc(name, **LAST), tmp_path / 'model.onnx'
    to_onnx(model, path, photos()[:2], sizes=dynamic() if any_size else None)
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for size, images in SIZES if any_size else SIZES[:1]:
        x = photos(size)[:images]
        assert (torch.from_numpy(compiled(x.numpy())[0]) - model(x)).abs().max() < 1e-4


@pytest.mark.sweep  # torchao's conversion takes half a minute
@models
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_quantized_export(name):
    """PT2E for inductor on x86: the convolutions inside of FADC layers too."""
    pt2e = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e')
    x86 = pytest.importorskip('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    model = create_fadc(name, **LAST)
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (photos(),)).module(), quantizer)
    prepared(photos())
    quantized = pt2e.convert_pt2e(prepared)
    assert sum('dequantize' in str(node.target) for node in quantized.graph.nodes) > 40
    assert 0 < error(quantized(photos()), model(photos()).double()) < 0.05  # 0.022
