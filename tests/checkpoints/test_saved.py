"""A model of one's own: saved, loaded, and read from whatever holds it."""
import pytest
import timm
import torch

from fadc_timm.checkpoints import load, load_checkpoint, write_folder
from tests.support.backbones import create_fadc, photos, trained

pytestmark = pytest.mark.usefixtures('one_thread')


@torch.no_grad()
def test_checkpoint_or_folder(tmp_path):
    """A file wants a name, a folder knows its own; both have the number of classes that they were saved with."""
    model = create_fadc('test_resnet_fadc', num_classes=5, bands=(2, 4))
    x = photos()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    with pytest.raises(RuntimeError, match='size mismatch'):
        load_checkpoint(tmp_path / 'a.pth', 'test_resnet_fadc')  # a file does not hold the bands
    folder = write_folder(model, tmp_path / 'folder', model_args=dict(bands=(2, 4)))
    for name in (None, 'test_resnet_fadc', 'test_resnet_fadc.r160_in1k'):
        loaded = load_checkpoint(folder, name)
        assert not loaded.training and torch.equal(loaded(x), model(x))
    assert load(folder, num_classes=3).training and load(folder, num_classes=3).num_classes == 3
    torch.save(trained('test_resnet'), tmp_path / 'a.pth')
    assert load_checkpoint(tmp_path / 'a.pth', 'test_resnet_fadc').num_classes == 1000
    for name, path, error, message in (
            ('test_convnext_fadc', folder, ValueError, 'holds the model test_resnet_fadc, not test_convnext_fadc'),
            (None, tmp_path / 'a.pth', ValueError, "a.pth' wants the model's name"),
            ('test_resnet_fadc', tmp_path / 'b', OSError, "There is no checkpoint or folder '.*b'"),
            (None, tmp_path, OSError, 'has no config.json, so it is no folder of a model')):
        with pytest.raises(error, match=message):
            load_checkpoint(path, name)
    with pytest.raises(OSError, match="no folder '.*b' of a model"):
        load(tmp_path / 'b')
    assert timm.create_model(f'local-dir:{folder}').num_classes == 5
