"""A small model for tests of the command line, of pictures and of scripts."""
import timm
import torch

from tests.support.off_identity import off_identity

MODEL = 'test_resnet_fadc'


def make_model():
    """A model whose layers have chosen something: dilations and weights depend on the position."""
    torch.manual_seed(0)
    return off_identity(timm.create_model(MODEL))
