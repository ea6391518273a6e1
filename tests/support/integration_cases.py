"""The models that consumers of timm backbones are tried on, how they are opened, and the mark of such a test."""
import pytest
from torch import nn

MODELS = ('test_resnet_fadc', 'test_convnext_fadc')
models = pytest.mark.parametrize('name', MODELS)
# for what takes tens of seconds
one_model = pytest.mark.parametrize('name', [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.sweep)])


def uses(package, what):
    """Mark a test as that of a line in the table of docs/integrations.md."""
    return pytest.mark.integration(package=package, what=what)


def opened(model):
    """The model with its residual branches open: timm starts them at zero, where nothing inside gets a gradient."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any():
            nn.init.ones_(m.weight)
    return model
