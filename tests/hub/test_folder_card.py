"""The card of a folder says where FADC is, and what it does there."""
import re

import pytest
import timm

import fadc_timm
from fadc_timm.hub.folder_card import folder_card

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('name, network, place', [
    ('test_dinat_fadc', '`test_dinat` of fadc_timm; replaced neighbourhood attention', 'in some of its neighbourhood'),
    ('test_dinat', '`test_dinat` of fadc_timm; replaced neighbourhood attention', 'in some of its neighbourhood'),
    ('test_resnet', f'`test_resnet` of timm {timm.__version__}; replaced convolutions', 'in place of some of its conv'),
])
def test_place(name, network, place, tmp_path):
    model = timm.create_model(name, num_classes=2)
    if not name.endswith('_fadc'):
        fadc_timm.lift_model(model)
    folder = fadc_timm.save(model, tmp_path / 'model', pretrained_cfg=dict(input_size=(3, 64, 64)))
    text = folder_card(folder, 'me/model', licence='mit')
    assert network in text and place in text
    assert ('predict their dilation' in text) == (name == 'test_resnet')
    assert ('neighborhood-attention' in text) == (name != 'test_resnet')


@pytest.mark.parametrize('channels', [1, 6])
def test_code_for_other_channels(channels, tmp_path):
    """It runs as it stands; the picture of the package has three channels."""
    model = timm.create_model('test_resnet_fadc', num_classes=2, in_chans=channels)
    folder = fadc_timm.save(model, tmp_path / 'model', pretrained_cfg=dict(input_size=(channels, 64, 64)))
    blocks = re.findall(r'```python\n(.*?)```', folder_card(folder, 'me/model', licence='mit'), re.DOTALL)
    assert len(blocks) == 3
    exec('\n'.join(blocks).replace('hf-hub:me/model', f'local-dir:{folder}'), {})


@pytest.mark.parametrize('options, says, says_not', [
    (dict(sampling='deform', freq_select=False, kernel_decompose='none'), 'deformable convolution (DCNv2) in', 'FADC)'),
    (dict(sampling='deform', modulated=False, freq_select=False), "(DCNv1) with FADC's AdaKern in", 'DCNv2) '),
    (dict(sampling='fixed', kernel_decompose='none'), "convolutions under FADC's FreqSelect in", 'predict'),
])
def test_what_the_layers_are(options, says, says_not, tmp_path):
    model = timm.create_model('test_resnet', num_classes=2)
    fadc_timm.lift_model(model, **options)
    folder = fadc_timm.save(model, tmp_path / 'model', pretrained_cfg=dict(input_size=(3, 64, 64)))
    text = folder_card(folder, 'me/model', licence='mit')
    assert says in text and says_not not in text.partition('## Model Details')[0]
