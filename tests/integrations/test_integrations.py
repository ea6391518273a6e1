"""Where timm backbones are used: each consumer with its real package, on members of both families.

`pip install -e '.[test,integrations]'`; without a package its tests are skipped. `scripts.checks.works_with` runs the
tests marked `integration` and writes down what passed, with versions, for the table of docs/integrations.md.
Elsewhere, and in that table too: export in test_export.py, pruning and quantisation in test_quantization.py,
torch.compile, torch.fx and timm's feature getters in models/test_models.py.
"""
import copy

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fadc_timm import FADConv2d
from tests.support.backbones import create_fadc, photos, trained
from tests.support.cases import error
from tests.support.integration_cases import models, opened, uses

pytestmark = pytest.mark.usefixtures('one_thread')


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


def load_from_disk(accelerate, name, state, folder, **kwargs):
    """A model whose parameters are made empty, and stay on disk, except those of its first module."""
    save_file(state, folder / 'model.safetensors')
    with accelerate.init_empty_weights():
        model = timm.create_model(name, num_classes=6).eval()
    places = {child: 'disk' for child, _ in model.named_children()}
    places[next(iter(places))] = 'cpu'
    return accelerate.load_checkpoint_and_dispatch(
        model, str(folder / 'model.safetensors'), device_map=places, offload_folder=str(folder / 'offload'), **kwargs)


@uses('accelerate', 'cpu_offload, disk_offload, and empty weights with a disk map: inference')
@models
@pytest.mark.parametrize('way', ['cpu', 'disk', 'empty'])
@torch.no_grad()
def test_offload(way, name, tmp_path):
    accelerate = pytest.importorskip('accelerate')
    model = create_fadc(name, num_classes=6)
    expected = model(photos())
    if way == 'cpu':
        model = accelerate.cpu_offload(model, execution_device='cpu')
    elif way == 'disk':
        model = accelerate.disk_offload(model, str(tmp_path), execution_device='cpu')
    else:
        model = load_from_disk(accelerate, name, model.state_dict(), tmp_path, offload_buffers=True)
    assert any(p.device.type == 'meta' for m in model.modules() if isinstance(m, FADConv2d) for p in m.parameters())
    assert error(model(photos()), expected.double()) < 1e-6


@torch.no_grad()
def test_offload_of_parameters_alone(tmp_path):
    """accelerate then loads no buffer of a module on disk: the plain ResNet computes with the running statistics of its
    start, without a word. An FADC ResNet raises, and a ConvNeXt, which has no buffers, is right.
    """
    accelerate = pytest.importorskip('accelerate')
    plain = timm.create_model('test_resnet', num_classes=6)
    plain.load_state_dict(trained('test_resnet', num_classes=6))
    assert plain.bn1.running_mean.any()
    loaded = load_from_disk(accelerate, 'test_resnet', plain.state_dict(), tmp_path)
    assert not loaded.bn1.running_mean.any() and error(loaded(photos()), plain.eval()(photos())) > 1
    with pytest.raises(ValueError, match='running_mean is on the meta device'):
        load_from_disk(accelerate, 'test_resnet_fadc', create_fadc('test_resnet_fadc', num_classes=6).state_dict(),
                       tmp_path)
    model = create_fadc('test_convnext_fadc', num_classes=6)
    loaded = load_from_disk(accelerate, 'test_convnext_fadc', model.state_dict(), tmp_path)
    assert error(loaded(photos()), model(photos()).double()) < 1e-6


# a classifier on features


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
