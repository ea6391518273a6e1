"""What can be refused is refused before a download, which a machine without a network tries several times."""
import sys

import pytest

from scripts.checks import timm_suite
from scripts.segmentation import compare
from scripts.studies import dilation_frequency, from_imagenet, train_default


def no_download(*args, **kwargs):
    pytest.fail('it would have been downloaded')


def test_timm_suite(monkeypatch, capsys):
    monkeypatch.setattr(timm_suite, 'fetch_tests', no_download)
    monkeypatch.setattr(sys, 'argv', ['timm_suite', 'test_*', 'resnt18_fadc'])
    with pytest.raises(SystemExit) as e:
        timm_suite.main()
    assert e.value.code == 2 and 'no model matches resnt18_fadc' in capsys.readouterr().err


def test_train_default(monkeypatch, capsys):
    monkeypatch.setattr(train_default, 'load_rasters', no_download)
    monkeypatch.setattr(sys, 'argv', ['train_default', '--model', 'test_resnt'])
    with pytest.raises(SystemExit) as e:
        train_default.main()
    assert e.value.code == 2 and 'no model test_resnt' in capsys.readouterr().err


def test_dilation_frequency(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dilation_frequency, 'states_of', no_download)
    assert dilation_frequency.main(['--images', str(tmp_path / 'absent')]) == 2
    assert 'no image or folder' in capsys.readouterr().err


@pytest.mark.parametrize('task, package', [
    ('segmentation', 'segmentation_models_pytorch'), ('faster_rcnn', 'pycocotools')])
def test_from_imagenet(task, package, monkeypatch, capsys, tmp_path):
    """Nor does each of the runs fail for it."""
    monkeypatch.setattr(from_imagenet, 'fetch_trunk', no_download)
    monkeypatch.setattr(from_imagenet, 'run_jobs', no_download)
    monkeypatch.setitem(sys.modules, package, None)
    assert from_imagenet.main(['--task', task, '--runs', str(tmp_path)]) == 1
    assert f'needs {package}: pip install' in capsys.readouterr().err


def test_compare(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare, 'classes_of', no_download)
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    for more in ([], ['--time']):
        assert compare.main(['--runs', str(tmp_path), *more]) == 1
        assert 'needs segmentation_models_pytorch: pip install' in capsys.readouterr().err
