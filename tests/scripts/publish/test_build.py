"""The figures that go with a published model: the logits of a fixed input, and the cost."""
import pytest
import timm
import torch
import yaml

from fadc_timm.checkpoints import fixed_input, fixed_logits
from fadc_timm.models.cost import model_cost
from scripts.publish.build import SAME, format_logits, sample_logits
from scripts.publish.config import read_config
from tests.support.cases import error
from tests.support.hub_config_cases import DEFAULT

pytestmark = pytest.mark.usefixtures('one_thread')


def test_fixed_input_tells_models_apart():
    x = fixed_input((3, 160, 160))
    assert x.shape == (1, 3, 160, 160) and x.abs().max() <= 2 and x.std() > 0.5
    assert fixed_input((1, 7, 5)).shape == (1, 1, 7, 5)
    config, size = read_config(DEFAULT), (3, 160, 160)
    model = timm.create_model(config.model, pretrained=True)
    expected = torch.tensor(config.expected_logits)
    measured = error(fixed_logits(model, size), expected)
    assert measured < 1e-6  # 1.2e-7
    for name, p in model.named_parameters():  # a twentieth of a pixel in the last layer is seen
        if name.endswith('layer4.0.conv2.ada_dr.conv.bias'):
            p.data += 0.05
    assert error(fixed_logits(model, size), expected) > 10 * SAME  # 8.7e-4


def test_sample_of_the_logits():
    assert sample_logits(torch.arange(6)).tolist() == list(range(6))
    assert sample_logits(torch.arange(1000)).tolist() == [i * 1000 // 16 for i in range(16)]
    for scale in (1e-5, 0.1, 1., 1e3):
        logits = torch.randn(16) * scale
        written = yaml.safe_load(format_logits(logits))
        assert all(isinstance(v, float) for v in written) and error(torch.tensor(written), logits) < 1e-6


@pytest.mark.parametrize('name, activations', [('resnet50', 11.1), ('convnext_tiny', 13.4), ('resnet18', 2.5)])
def test_activations_are_those_of_timms_cards(name, activations):
    """And at least as many with FADC, but for strided layers, whose modules see the map before the stride."""
    assert round(model_cost(name, 1000, (3, 224, 224)).activations, 1) == activations
    plain, fadc = (model_cost(n, 1000, (3, 224, 224)) for n in (name, f'{name}_fadc'))
    assert fadc.activations > plain.activations and fadc.params > plain.params and fadc.gmacs > plain.gmacs
