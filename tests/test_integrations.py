"""Where timm backbones are used: each consumer with its real package, on members of both families.

`pip install -e '.[test,integrations]'`; without a package its tests are skipped. `scripts/works_with.py` runs this file
and writes down what passed, with versions, for the table in the README. Elsewhere: torch.compile, torch.fx and timm's
feature getters in test_models.py, which stand in that table too.
"""
import copy
import time

import pytest
import timm
import torch
from backbones import create_fadc, photos
from cases import error
from conftest import needs_dynamo
from PIL import Image
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn.utils import parametrizations, prune
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fadc_timm import FADConv2d

pytestmark = pytest.mark.usefixtures('one_thread')

MODELS = ('test_resnet_fadc', 'test_convnext_fadc')
models = pytest.mark.parametrize('name', MODELS)


def uses(package, what):
    """Mark a test as that of a line in the README's table."""
    return pytest.mark.integration(package=package, what=what)


def opened(model):
    """The model with its residual branches open: timm starts them at zero, where nothing inside gets a gradient."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any():
            nn.init.ones_(m.weight)
    return model


def check_step(model, loss, unused=()):
    """Every parameter gets a gradient, those of FADC too."""
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(tuple(unused))]
    assert not missing, missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad.norm() > 0 for m in model.modules() if isinstance(m, FADConv2d) for p in m.ada_dr.parameters())


# segmentation_models_pytorch

DECODERS = ('Unet', 'UnetPlusPlus', 'DeepLabV3', 'DeepLabV3Plus', 'FPN', 'PAN', 'UPerNet', 'Segformer', 'DPT')


@uses('segmentation_models_pytorch', 'tu-*_fadc: forward, backward, save, load')
@models
@pytest.mark.parametrize('decoder', DECODERS)
def test_segmentation_models(decoder, name, tmp_path):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = opened(getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=5))
    assert any(isinstance(m, FADConv2d) for m in model.encoder.modules())
    x = photos(128 if decoder == 'PAN' else 64)[:2]
    y = model(x)
    assert y.shape == (2, 5, *x.shape[2:])
    # DPT keeps the classifier's part of the encoder, and does not call it; so with any encoder
    check_step(model, y.square().mean(), ('encoder.model.fc.', 'encoder.model.head.') if decoder == 'DPT' else ())
    model.eval().save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


# transformers


def finite(model):
    return all(t.isfinite().all() for t in (*model.parameters(), *model.buffers()))


@uses('transformers', 'TimmBackbone: feature maps')
@models
@torch.no_grad()
def test_timm_backbone(name):
    transformers = pytest.importorskip('transformers')
    indices = [1, 2, 3] if 'convnext' in name else [2, 3, 4]
    config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=indices)
    backbone = transformers.TimmBackbone(config).eval()
    assert finite(backbone)
    plain = timm.create_model(name, features_only=True, out_indices=indices).eval()
    plain.load_state_dict(backbone._backbone.state_dict())
    maps = backbone(photos()).feature_maps
    assert all(map(torch.equal, maps, plain(photos()))) and len(maps) == 3


@uses('transformers', 'TimmWrapperModel, TimmWrapperForImageClassification: save_pretrained and back')
@models
@pytest.mark.parametrize('wrapper', ['TimmWrapperModel', 'TimmWrapperForImageClassification'])
@torch.no_grad()
def test_timm_wrapper(wrapper, name, tmp_path):
    transformers = pytest.importorskip('transformers')
    cls = getattr(transformers, wrapper)
    model = cls(transformers.TimmWrapperConfig(architecture=name, num_labels=7)).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert finite(loaded)
    state = model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in loaded.state_dict().items())
    assert torch.equal(loaded(photos())[0], model(photos())[0])


# torchvision's detectors


class Backbone(nn.Module):
    """A feature pyramid on timm's features, as torchvision's detectors want it."""

    def __init__(self, name, extra):
        super().__init__()
        indices = (0, 1, 2, 3) if 'convnext' in name else (1, 2, 3, 4)
        self.body = timm.create_model(name, features_only=True, out_indices=indices)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 16, extra_blocks=extra)
        self.out_channels = 16

    def forward(self, x):
        return self.fpn({str(i): f for i, f in enumerate(self.body(x))})


def detector(kind, name):
    backbone = Backbone(name, LastLevelMaxPool())
    sizes = dict(min_size=96, max_size=128)
    if kind == 'FasterRCNN':
        return FasterRCNN(backbone, num_classes=3, box_detections_per_img=5, **sizes)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (96,)), ((1.,),) * 5)
    return RetinaNet(backbone, num_classes=3, anchor_generator=anchors, **sizes)


@uses('torchvision', 'Faster R-CNN, RetinaNet over an FPN: training step, inference')
@models
@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet'])
def test_detection(kind, name):
    model = opened(detector(kind, name))
    images = [photos(96)[0], photos(80)[1]]
    targets = [dict(boxes=torch.tensor([[8., 8., 60., 50.]]), labels=torch.tensor([1])) for _ in images]
    losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    check_step(model, sum(losses.values()))
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2 and all(f['boxes'].isfinite().all() for f in found)


# training frameworks


@uses('lightning', 'a training step')
@models
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = opened(timm.create_model(name, num_classes=6))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    before = copy.deepcopy(module.state_dict())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(photos(), torch.arange(6)), 6)
    trainer = lightning.Trainer(
        max_steps=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(module, data)
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.endswith('ada_dr.conv.weight') for n in changed)


@uses('accelerate', 'a training step')
@models
def test_accelerate(name):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    net = opened(timm.create_model(name, num_classes=6))
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    before = copy.deepcopy(net.state_dict())
    loss = nn.functional.cross_entropy(net(photos()), torch.arange(6))
    accelerator.backward(loss)
    optimizer.step()
    assert any(n.endswith('ada_dr.conv.weight') and not torch.equal(t, before[n]) for n, t in net.state_dict().items())


# export


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


# what timm's own networks allow: pruning, quantised linear layers, a classifier on features


@uses('torch', 'torch.nn.utils.prune')
@models
@torch.no_grad()
def test_pruning(name):
    """Of lifted layers: masks on their weights, which can be made permanent."""
    model = create_fadc(name)
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    before = model(photos())
    for m in layers:
        prune.l1_unstructured(m, 'weight', 0.3)
    pruned = model(photos())
    assert error(pruned, before.double()) > 1e-3 and pruned.isfinite().all()
    for m in layers:
        prune.remove(m, 'weight')
        assert 0.29 < (m.weight == 0).float().mean() < 0.31
    assert error(model(photos()), pruned.double()) < 1e-5


@uses('torch', 'torch.nn.utils.parametrizations: weight_norm, spectral_norm')
@models
@pytest.mark.parametrize('kind', ['weight_norm', 'spectral_norm'])
def test_parametrization(kind, name):
    """Of lifted layers: weight_norm leaves the function, spectral_norm divides by the norm; all of it trains."""
    model = create_fadc(name)
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    expected, weights = model(photos()).detach(), [m.weight.detach().clone() for m in layers]
    for m in layers:
        getattr(parametrizations, kind)(m)
    y = model(photos())
    if kind == 'weight_norm':
        assert error(y.detach(), expected.double()) < 1e-5
    else:
        for m, w in zip(layers, weights):
            assert error(m.weight.detach() * (w.norm() / m.weight.norm()), w.double()) < 1e-5
            assert not torch.equal(m.weight, w)
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@uses('torch', 'torch.ao.quantization.quantize_dynamic')
@models
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_dynamic_quantization(name):
    """Linear layers, the classifier's and those of AdaKern, in int8."""
    model = create_fadc(name)
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(m.ada_kern.fc) for m in quantized.modules() if isinstance(m, FADConv2d)}
    assert all('quantized' in kind.__module__ for kind in kinds) and kinds
    assert 0 < error(quantized(photos()), model(photos()).double()) < 0.2


def pair(name):
    """The FADC model and its base, with random weights and open residual branches."""
    return create_fadc(name, num_classes=6), opened(timm.create_model(name.removesuffix('_fadc'), num_classes=6)).eval()


def check_quantized(model):
    """Whatever torch.fx sees is quantised; FADConv2d, a leaf there, is not, nor is anything inside of it."""
    layers = [m for m in model.modules() if isinstance(m, FADConv2d)]
    inside = {part for m in layers for part in m.modules()}
    quantized = {m for m in model.modules() if 'quantized' in type(m).__module__}
    assert layers and len(quantized) > 10 and not quantized & inside
    assert not [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear) and m not in inside]


@uses('torch', 'torch.ao.quantization.quantize_fx: static; FADC layers stay in float32')
@models
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_static_quantization(name):
    """The error is at most twice that of the base."""
    errors = []
    for model in pair(name):
        prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (photos(),))
        prepared(photos())
        quantized = convert_fx(prepared)
        errors.append(error(quantized(photos()), model(photos()).double()))
        if model.default_cfg['architecture'] == name:
            check_quantized(quantized)
    assert 0 < errors[0] < 2 * errors[1], errors


@uses('torch', 'torch.ao.quantization.quantize_fx: quantization-aware training; FADC layers stay in float32')
@models
@pytest.mark.filterwarnings('ignore')
def test_quantization_aware_training(name):
    """All of it trains, and what is then quantised is as near to what was trained as the base is, times two."""
    errors = []
    for net in pair(name):
        model = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping('x86'), (photos(),))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(photos()), torch.arange(6)).backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        with torch.no_grad():
            expected = model.eval()(photos()).double()
            quantized = convert_fx(model)
            errors.append(error(quantized(photos()), expected))
        if net.default_cfg['architecture'] == name:
            check_quantized(quantized)
    assert 0 < errors[0] < 2 * errors[1], errors


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


@uses('torchao', 'quantize_: int8 weights, int8 activations and weights')
@models
@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_torchao(config, name):
    """Linear layers, the classifier's and those of AdaKern."""
    torchao = pytest.importorskip('torchao.quantization')
    model = create_fadc(name)
    expected = model(photos()).double()
    torchao.quantize_(model, getattr(torchao, config)())
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear and all(isinstance(m.weight, torchao.Int8Tensor) for m in linear)
    assert 0 < error(model(photos()), expected) < 0.02  # 0.0076


@uses('scikit-learn', 'a classifier on pooled features')
@torch.no_grad()
def test_features_for_sklearn():
    """Crops of two photographs are told apart by features of the weights in the package."""
    datasets, linear = (pytest.importorskip(f'sklearn.{m}') for m in ('datasets', 'linear_model'))
    transform = timm.data.create_transform((3, 160, 160), crop_pct=1.)
    model = timm.create_model('test_resnet_fadc', pretrained=True, num_classes=0).eval()
    crops, labels = [], []
    for label, image in enumerate(datasets.load_sample_images().images):
        for top in range(0, 320, 64):
            for left in range(0, 560, 80):
                crops.append(transform(Image.fromarray(image[top:top + 80, left:left + 80])))
                labels.append(label)
    features = model(torch.stack(crops)).numpy()
    train = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % 2 == 0
    classifier = linear.LogisticRegression(max_iter=1000).fit(features[train], torch.tensor(labels)[train])
    assert classifier.score(features[~train], torch.tensor(labels)[~train]) > 0.8
