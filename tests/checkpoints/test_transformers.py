"""A published folder in transformers: TimmWrapper and TimmBackbone."""
import json
from pathlib import Path

import pytest
import timm
import torch

import fadc_timm  # noqa: F401  registers the models
from fadc_timm.checkpoints import fixed_input, reload, write_folder

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.usefixtures('one_thread')

NAMES = ['test_resnet_fadc.bluemarble_climate', 'test_convnext_fadc']


@pytest.fixture(params=NAMES)
def folder(request, tmp_path, monkeypatch):
    """A folder as scripts.publish.push_to_hub writes it; nothing is looked up."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    args = {} if '.' in request.param else dict(num_classes=7, padding_mode='replicate')
    model = timm.create_model(request.param, pretrained='.' in request.param, **args)
    args.pop('num_classes', None)
    return write_folder(model, tmp_path / 'model', model_args=args)


@torch.no_grad()
def test_wrapper(folder: Path):
    x, model = fixed_input((3, 160, 160)), reload(folder)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(wrapped).__name__ == 'TimmWrapperForImageClassification'
    torch.testing.assert_close(wrapped(x).logits, model(x), rtol=1e-5, atol=1e-5)
    assert wrapped.config.num_labels == model.num_classes
    if model.num_classes == 6:
        assert list(wrapped.config.id2label.values())[:2] == ['ocean', 'tropical']
    wrapped = transformers.AutoModel.from_pretrained(folder).eval()
    features = model.forward_features(x)
    torch.testing.assert_close(wrapped(x).last_hidden_state, features, rtol=1e-5, atol=1e-5 * features.abs().max())


@pytest.mark.filterwarnings('ignore:The option ada_dr:FutureWarning')
@pytest.mark.parametrize('folder', ['test_convnext_fadc'], indirect=True)
@torch.no_grad()
def test_folder_of_an_older_version(folder: Path):
    """With `ada_dr` in config.json, which is `sampling` today."""
    x, expected = fixed_input((3, 160, 160)), reload(folder)
    config = json.loads((folder / 'config.json').read_text())
    config['model_args']['ada_dr'] = True
    (folder / 'config.json').write_text(json.dumps(config))
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(wrapped(x).logits, expected(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_wrapper_saves_what_it_loads(folder: Path, tmp_path):
    """After fine-tuning there: its own folder loads again, with the arguments of the model."""
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    wrapped.save_pretrained(tmp_path / 'saved')
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'saved').eval()
    x = fixed_input((3, 160, 160))
    assert torch.equal(again(x).logits, wrapped(x).logits)


@torch.no_grad()
def test_backbone(folder: Path):
    """Frozen norms: transformers 5.23 resets the running statistics of others, also of plain timm models."""
    x, model = fixed_input((3, 160, 160)), reload(folder)
    config = transformers.TimmBackboneConfig(
        backbone=f'local-dir:{folder}', out_indices=[1, 2, 3], freeze_batch_norm_2d=True)
    backbone = transformers.TimmBackbone(config, pretrained=True).eval()
    expected = model.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
    actual = backbone(x).feature_maps
    assert len(actual) == 3 and backbone.channels == [f.shape[1] for f in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * e.abs().max())


@torch.no_grad()
def test_backbone_from_pretrained(folder: Path):
    x, model = fixed_input((3, 160, 160)), reload(folder)
    backbone = transformers.TimmBackbone.from_pretrained(f'local-dir:{folder}', out_indices=(1, 2, 3)).eval()
    if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):  # see test_backbone; the other remedy
        backbone._backbone.load_state_dict(model.state_dict(), strict=False)
    expected = model.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
    for a, e in zip(backbone(x).feature_maps, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * e.abs().max())
