"""A small model for tests of the command line, of pictures and of scripts."""
import timm
import torch

from fadc_timm.layers import FADConv2d

MODEL = 'test_resnet_fadc'


def make_model():
    """A model whose layers have chosen something: dilations and weights depend on the position."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    for m in model.modules():
        if isinstance(m, FADConv2d):
            for conv in (m.ada_dr.conv, m.freq_select.conv):
                torch.nn.init.normal_(conv.weight, std=0.05)
    return model
