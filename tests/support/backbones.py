"""Backbones for the tests: which there are, weights that compute something, photographs, and how near is lossless."""
import functools
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg
from torch import nn
from torchvision.transforms.functional import to_tensor

import fadc_timm
from fadc_timm.layers import FADC_LAYERS
from tests.support.off_identity import off_identity

PACKAGE = Path(fadc_timm.__file__).parent
MODULES = ('resnet', 'convnext', 'dinat')
BASES = [base for module in MODULES for base in timm.list_models(module=module)]
VARIANTS = {'resnet': ('_fadc', '_dcn', '_dcn_fadc'), 'convnext': ('_fadc',),
            'dinat': ('_fadc',)}  # what our names end with
STAGES = {'resnet': [f'layer{i}.' for i in range(1, 5)], 'convnext': [f'stages.{i}.' for i in range(4)],
          'dinat': [f'stages.{i}.' for i in range(4)]}

# One block a stage is enough to see a kind of block.
THIN = dict(layers=(1, 1, 1, 1))
REPRESENTATIVES = {
    'resnet18': {}, 'resnet10t': {}, 'resnet26d': {}, 'resnet50c': THIN, 'resnet50s': THIN, 'resnet50_gn': THIN,
    'resnext50_32x4d': THIN, 'seresnet18': {}, 'ecaresnet26t': {}, 'resnetaa50': THIN, 'resnetblur18': {},
    'resnetrs50': THIN, 'test_resnet': {},
    'convnext_atto': {}, 'convnext_atto_ols': {}, 'convnext_zepto_rms': {}, 'convnextv2_atto': {}, 'test_convnext': {},
}

TINY = ('test_resnet', 'test_convnext')
SMALL = ('resnet10t', 'convnext_atto')

# Relative error of an FADC model at its start against its base: eps, rounding, and what the depth makes of it.
LOSSLESS = 5e-4  # 1.4e-4
ROUNDING = 2e-5  # without AdaDR's eps: 4.4e-6 (convnextv2_atto)


@functools.cache
def photos(size=64):
    """Six crops of the photograph in the package."""
    boxes = [(0, 0, 400, 400), (200, 0, 600, 400), (150, 100, 350, 300), (0, 250, 150, 400), (300, 150, 450, 300),
             (400, 20, 500, 120)]
    image = Image.open(PACKAGE / 'data' / 'coffee.jpg').convert('RGB')
    crops = torch.stack([to_tensor(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)) for box in boxes])
    return (crops - crops.mean((0, 2, 3), keepdim=True)) / crops.std((0, 2, 3), keepdim=True)


@torch.no_grad()
def awaken(model):
    """As after training: timm starts residual branches and layer scales at (nearly) zero, here they are open, and the
    norms have seen the photographs. Half of their statistics, as those alone make deep networks chaotic: they then
    amplify the rounding of float32 a thousandfold, the bases as well.
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith('bias'):
            p.normal_(std=0.1)
        elif p.ndim == 1:
            p.uniform_(0.5, 1.5)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 0.5
    model.train()(photos())
    for m in norms:
        m.momentum = 0.1
    return model.eval()


@functools.lru_cache(maxsize=1)
def _trained(base, kwargs):
    torch.manual_seed(0)
    model = awaken(timm.create_model(base, **dict(kwargs)))
    with torch.no_grad():
        model.get_classifier().bias -= model(photos()).mean(0)  # no class is everyone's
    return model.state_dict()


def trained(base, **kwargs):
    """State dict of a base that computes something."""
    return dict(_trained(base, tuple(kwargs.items())))


def load(name, checkpoint, **kwargs):
    """A model in eval mode from a file or a state dict; a classifier of another size is drawn alike every time."""
    source = dict(state_dict=dict(checkpoint)) if isinstance(checkpoint, dict) else dict(file=str(checkpoint))
    torch.manual_seed(1)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **kwargs).eval()


def with_tag(base, suffix=''):
    """The base or `<base>_fadc` with the base's default tag: weights of 1000 classes."""
    return '.'.join(filter(None, (base + suffix, get_pretrained_cfg(base).tag)))


def create_fadc(name, std=0.5, **kwargs):
    """An FADC model away from the identity, in eval mode."""
    torch.manual_seed(2)
    model = timm.create_model(name, **kwargs)
    return awaken(off_identity(model, std, statistics=False))  # those come from the photographs


def fad_convs(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FADC_LAYERS)}


def module_of(base):
    return next(m for m in MODULES if base in timm.list_models(module=m))


def check_learns(model, optimizer):
    """Eight steps learn the photographs by heart, with a gradient for every parameter."""
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(photos()), torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
