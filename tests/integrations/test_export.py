"""Exported networks: torch.export, ONNX, and quantisation of an exported graph."""
import time

import pytest
import torch

from tests.support.backbones import create_fadc, photos
from tests.support.cases import error
from tests.support.integration_cases import models, uses
from tests.support.marks import needs_dynamo

pytestmark = pytest.mark.usefixtures('one_thread')


def dynamic(step=1):
    height, width = (torch.export.Dim(name, min=-(-33 // step)) for name in ('height', 'width'))
    height, width = (d if step == 1 else step * d for d in (height, width))
    return ({0: torch.export.Dim('batch', max=1024), 2: height, 3: width},)


# the last stage alone: symbolic sizes cost seconds a layer
LAST = dict(fadc_stages=(False, False, False, True), num_classes=10)
STAGES = [LAST, pytest.param(dict(num_classes=10), marks=pytest.mark.sweep)]


@uses('torch', 'torch.export: any batch, any multiple of 32')
@needs_dynamo
@models
@pytest.mark.parametrize('stages', STAGES, ids=['last', 'all'])
@torch.no_grad()
def test_export(stages, name):
    """Multiples of 32, as test_resnet, the plain one too, has downsampling that pads other sizes."""
    model = create_fadc(name, **stages)
    program = torch.export.export(model, (photos()[:2],), dynamic_shapes=dynamic(32)).module()
    for x in (photos()[:2], photos(96)[:3], photos(160)[1:2, :, :, :64]):
        assert error(program(x), model(x).double()) < 1e-5


def seconds(f):
    f()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


@uses('onnxruntime', "ONNX by torch's exporter, opset 20: any batch and size, within 1e-4, at most 3x eager's time")
@models
@pytest.mark.parametrize('stages', STAGES, ids=['last', 'all'])
@torch.no_grad()
def test_onnx(stages, name, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = create_fadc(name, **stages)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (photos()[:2],), dynamo=True, opset_version=20, dynamic_shapes=dynamic(), verbose=False).save(path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    feed = session.get_inputs()[0].name
    for x in (photos()[:2], photos(97)[:3], photos(160)[:1]):
        y = torch.from_numpy(session.run(None, {feed: x.numpy()})[0])
        assert (y - model(x)).abs().max() < 1e-4  # 5.2e-7
    exported, eager = seconds(lambda: session.run(None, {feed: x.numpy()})), seconds(lambda: model(x))
    assert exported < 3 * eager, (exported, eager)  # 0.4 to 0.7 of it


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
