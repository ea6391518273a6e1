"""DiNAT, plain and with FADC, where timm backbones are used, and in graphs of torch."""
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fadc_timm.layers import FADNeighborhoodAttention
from tests.support.backbones import create_fadc, photos
from tests.support.cases import error
from tests.support.marks import needs_is_exporting
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')

NAMES = ('test_dinat', 'test_dinat_fadc')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('decoder', [
    'UPerNet', 'Unet', *(pytest.param(d, marks=pytest.mark.sweep) for d in ('FPN', 'DeepLabV3Plus'))])
def test_segmentation_models(decoder, name, tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=5)
    x = photos(64)[:2]
    y = model(x)
    assert y.shape == (2, 5, 64, 64)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(smp.from_pretrained(tmp_path).eval()(x), model(x))


def test_recipe():
    """The segmentation script's network: FADC where the convolutions' variants have no place."""
    pytest.importorskip('segmentation_models_pytorch')
    from scripts.segmentation.model import build
    plain = build('test_dinat', 5, decoder_channels=16, seed=3)
    fadc = build('test_dinat_fadc', 5, decoder_channels=16, seed=3, freq_select_stages=(3, 4))
    assert not plain.replaced and len(fadc.replaced) == 4
    layers = [m for m in fadc.model.modules() if isinstance(m, FADNeighborhoodAttention)]
    assert [m.freq_select is not None for m in layers] == [False, True, True, True]
    with torch.no_grad():
        assert error(fadc.model.eval()(photos()[:1]), plain.model.eval()(photos()[:1])) < 1e-6
    for variant in ('dcnv2', 'adadr', 'dilation2'):
        with pytest.raises(ValueError, match=f"'{variant}' is for convolutions.*its variants are 'plain' and 'fadc'"):
            build('test_dinat', 5, variant)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_timm_backbone(name):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=[1, 2, 3])
    backbone = transformers.TimmBackbone(config).eval()
    plain = timm.create_model(name, features_only=True, out_indices=[1, 2, 3]).eval()
    plain.load_state_dict(backbone._backbone.state_dict())
    maps = backbone(photos()).feature_maps
    assert all(map(torch.equal, maps, plain(photos()))) and len(maps) == 3


# the last stage alone has FADC: symbolic sizes cost seconds per layer
LAST = dict(fadc_stages=(False, False, False, True), num_classes=3)


@pytest.mark.sweep  # symbolic sizes: half a minute
@needs_is_exporting
@torch.no_grad()
def test_export():
    """Any batch and any size at which no map is smaller than its window, in torch's own operators."""
    model = create_fadc('test_dinat_fadc', **LAST)
    batch, height, width = (torch.export.Dim(n, min=low, max=64) for n, low in (('b', 1), ('h', 3), ('w', 3)))
    program = torch.export.export(
        model, (photos(96)[:2],), dynamic_shapes=({0: batch, 2: 32 * height, 3: 32 * width},)).module()
    assert 'fadc_timm' not in str(program.graph)
    for x in (photos(96)[:2], photos(160)[:3], photos(160)[1:2, :, :, :128]):
        assert error(program(x), model(x)) < 1e-5


@pytest.mark.sweep
@pytest.mark.parametrize('training', [False, True])
def test_compile(training):
    """One graph for all batches and sizes."""
    model = off_identity(timm.create_model('test_dinat_fadc', drop_path_rate=0., **LAST), 0.3).train(training)
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch, height, width in ((2, 96, 128), (3, 128, 96), (5, 160, 192)):
        x = torch.randn(batch, 3, height, width)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        assert error(y.detach(), model(x).detach()) < 1e-5
        if training:
            y.square().sum().backward()
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@pytest.mark.sweep  # torch's exporter takes a minute
@torch.no_grad()
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = create_fadc('test_dinat_fadc', **LAST)
    torch.onnx.export(model, (photos(96)[:2],), dynamo=True, opset_version=20, verbose=False).save(tmp_path / 'm.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'm.onnx', providers=['CPUExecutionProvider'])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: photos(96)[:2].numpy()})[0])
    assert error(y, model(photos(96)[:2])) < 1e-5
