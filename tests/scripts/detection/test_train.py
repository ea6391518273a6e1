"""scripts.detection.train: the script itself, resumed to the bit, its evaluation, two processes."""
import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.detection.annotations import CocoImages
from tests.support.detection_cases import content, write, write_folder
from tests.support.processes import torchrun
from tests.support.training_cases import losses

pytestmark = pytest.mark.usefixtures('one_thread')

OPTIONS = ['--backbone', 'test_resnet_fadc', '--fpn-channels', '8', '--short', '48', '64', '--long', '96', '--batch',
           '2', '--steps', '4', '--warmup', '1', '--ema', '0.5', '--data', 'folder', '--log-every', '1',
           '--save-every', '2', '--threads', '1', '--device', 'cpu']


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / 'data')


def main(*args):
    pytest.importorskip('pycocotools')
    from scripts.detection import train as train_detector
    return train_detector.main([str(a) for a in args])


def test_script(root, tmp_path, capsys):
    """Ended and resumed as left alone; then tested, with the averaged weights, again by --eval, with pictures."""
    args = [*OPTIONS, '--root', root]
    assert main(*args, '--output', tmp_path / 'whole', '--eval-every', 3) == 0
    out = capsys.readouterr().out
    assert 'faster_rcnn over test_resnet, fadc' in out and '5 convolutions replaced' in out
    assert 'at a learning rate of 0.0025, a tenth of that after step 3 and again after step 4' in out
    assert '4 images to train; 4 steps, 1 of them warm-up' in out
    assert out.count('Average Precision') == out.count('Average Recall') == 6
    assert main(*args, '--output', tmp_path / 'ended', '--stop-at', 2) == 0
    assert [row['step'] for row in losses(tmp_path / 'ended')] == ['1', '2']
    assert main(*args, '--output', tmp_path / 'ended') == 0
    assert 'after 2 of 4 steps' in capsys.readouterr().out
    assert losses(tmp_path / 'ended') == losses(tmp_path / 'whole')
    results = [json.loads((tmp_path / name / 'result.json').read_text()) for name in ('whole', 'ended')]
    assert results[0] == results[1] and results[0]['images'] == 2
    assert results[0]['torch'] == torch.__version__ and results[0]['device'].startswith('cpu: ')
    assert results[0]['config']['classes'] == ['square', 'wide'] and results[0]['added'] > 0
    assert (tmp_path / 'whole' / 'val.csv').read_text().splitlines()[0] == 'step,ap,ap50,ap75'
    found = json.loads((tmp_path / 'whole' / 'detections_test.json').read_text())
    assert len(found) == results[0]['detections']
    assert main('--eval', tmp_path / 'whole' / 'last.pt', '--root', root, '--draw', 2, '--draw-score', 0,
                '--device', 'cpu') == 0
    tested = json.loads((tmp_path / 'whole' / 'eval.json').read_text())
    assert tested['lines'] == results[0]['lines'] and tested['ap'] == results[0]['ap']
    assert sorted(p.name for p in (tmp_path / 'whole' / 'pictures_test').iterdir()) == ['v0.png', 'v1.png']
    # the checkpoint is one for --init too
    from scripts.detection.model import build
    built = build('test_resnet', 7, 'fadc', init=str(tmp_path / 'whole' / 'last.pt'), fpn_channels=8)
    ema = torch.load(tmp_path / 'whole' / 'last.pt', weights_only=True)['model_ema']
    key = next(k for k in ema if k.startswith('backbone.timm_model.') and k.endswith('.ada_dr.conv.weight'))
    assert 'model_ema' in built.loaded and torch.equal(built.model.state_dict()[key], ema[key])
    # another recipe is refused, and so are other classes and other scripts
    capsys.readouterr()
    assert main(*args, '--output', tmp_path / 'whole', '--lr', '1e-2') == 1
    assert 'is of another run: lr is 0.01, was 0.0025' in capsys.readouterr().err
    for split in ('train', 'val'):
        made, pictures = content(split)
        made['categories'][0]['name'] = 'long'
        write(root, split, made, pictures)
    assert main('--eval', tmp_path / 'whole' / 'last.pt', '--root', root, '--device', 'cpu') == 1
    assert "class 1 was 'wide' and is 'long'" in capsys.readouterr().err


@pytest.mark.parametrize('detector', ['faster_rcnn', 'mask_rcnn'])
def test_predict(detector, root, tmp_path, capsys):
    """Images without annotations get the detections of the test, in a file that pycocotools reads, and pictures."""
    args = [*OPTIONS, '--detector', detector, '--steps', '1', '--warmup', '0', '--root', root]
    assert main(*args, '--output', tmp_path / 'run') == 0
    photos = tmp_path / 'photos'
    photos.mkdir()
    split = CocoImages(root / 'val' / 'annotations.json', root / 'val')
    for entry in split.entries:
        Image.open(entry.path).save(photos / entry.path.with_suffix('.png').name)
    predict = ['--eval', tmp_path / 'run' / 'last.pt', '--predict', photos, '--device', 'cpu']
    assert main(*predict, '--draw', 8, '--draw-score', 0, '--output', tmp_path / 'out') == 0
    assert '2 images, ' in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / 'out' / 'pictures_predictions').iterdir()) == ['v0.png', 'v1.png']
    from pycocotools.coco import COCO
    found = COCO(tmp_path / 'out' / 'predictions.json')
    tested = json.loads((tmp_path / 'run' / 'detections_test.json').read_text())
    assert len(found.anns) == len(tested) > 0 and [c['name'] for c in found.cats.values()] == ['square', 'wide']
    assert [a['bbox'] for a in found.anns.values()] == [d['bbox'] for d in tested]
    assert [a['score'] for a in found.anns.values()] == [d['score'] for d in tested]
    masks = [found.annToMask(a) for a in found.anns.values() if 'segmentation' in a]
    assert [m.sum() for m in masks] == ([a['area'] for a in found.anns.values()] if 'mask' in detector else [])
    assert main(*predict, '--output', photos) == 1
    assert 'will be written, and the images are those in' in capsys.readouterr().err


@pytest.mark.sweep
def test_two_processes(root, tmp_path):
    """Under torchrun one process writes, each sees its half of the batch, and each image is tested once."""
    pytest.importorskip('pycocotools')
    args = ['-m', 'scripts.detection.train', *OPTIONS, '--batch', '4', '--steps', '2', '--root', root, '--output']
    out = torchrun(*args, tmp_path / 'two')
    assert out.count('5 convolutions replaced') == 1 and out.count('Average Precision') == 6
    result = json.loads((tmp_path / 'two' / 'result.json').read_text())
    found = json.loads((tmp_path / 'two' / 'detections_test.json').read_text())
    assert result['images'] == 2 and result['detections'] == len(found)
    assert [d['image_id'] for d in found] == sorted(d['image_id'] for d in found)
    assert main(*args[2:], tmp_path / 'one') == 0
    for one, two in zip(losses(tmp_path / 'one'), losses(tmp_path / 'two'), strict=True):
        assert float(one['loss']) == pytest.approx(float(two['loss']), rel=0.3)


@pytest.mark.parametrize('detector', ['retinanet', 'mask_rcnn'])
def test_other_detectors(detector, root, tmp_path, capsys):
    """With frozen stages and norms; masks have twelve lines of their own."""
    args = [*OPTIONS, '--detector', detector, '--frozen-stages', '2', '--frozen-bn', '--steps', '1', '--warmup', '0',
            '--batch', '1', '--ema', '0', '--root', root]
    assert main(*args, '--output', tmp_path / 'out') == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert 'frozen: 2 stages with ' in out and result['config']['frozen_bn'] is True
    masks = detector == 'mask_rcnn' and result['detections'] > 0
    assert out.count('Average Precision') == 6 + 6 * masks and ('masks' in result) == masks


@pytest.mark.sweep
def test_learns(root, tmp_path):
    """Bright boxes on dark noise are found after some steps of AdamW."""
    args = ['--backbone', 'test_resnet_fadc', '--fpn-channels', '16', '--short', '64', '--long', '96', '--batch', '4',
            '--preset', 'adamw', '--lr', '2e-3', '--steps', '60', '--data', 'folder', '--root', root, '--threads',
            '1', '--device', 'cpu', '--output', tmp_path / 'out', '--milestones', '45', '--flip-vertical', '0.5']
    assert main(*args) == 0
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert result['ap50'] > 30


def test_truth_scores_full(root):
    """The true boxes as detections have an AP of 100; none have 0."""
    pytest.importorskip('pycocotools')
    from scripts.detection.evaluation import SCORES, coco_scores
    split = CocoImages(root / 'val' / 'annotations.json', root / 'val')
    truth = split.ground_truth()
    found = [{key: a[key] for key in ('image_id', 'category_id', 'bbox')} | {
        'score': 0.9, 'segmentation': truth.annToRLE(a)} for e in split.entries for a in e.annotations]
    for kind in ('bbox', 'segm'):
        scores, lines = coco_scores(split, found, kind)
        assert scores['ap'] == scores['ap75'] == pytest.approx(100) and len(lines.splitlines()) == len(SCORES) == 12
    scores, lines = coco_scores(split, [])
    assert scores['ap'] == 0 and scores['ap_large'] == -1 and len(lines.splitlines()) == 12


def test_sizes_of_masks(tmp_path):
    """Of masks the area counts, not that of the box: a thin diagonal one is small, and no medium detection."""
    pytest.importorskip('pycocotools')
    from pycocotools import mask

    from scripts.detection.evaluation import coco_scores
    truth = {'id': 1, 'image_id': 10, 'category_id': 3, 'iscrowd': 0, 'bbox': [80, 80, 40, 40], 'area': 1600,
             'segmentation': [[80, 80, 120, 80, 120, 120, 80, 120]]}
    write(tmp_path, 'val', {
        'categories': [{'id': 3, 'name': 'square'}], 'annotations': [truth],
        'images': [{'id': 10, 'file_name': 'a.png', 'width': 128, 'height': 128}]},
        {'a.png': np.zeros((128, 128, 3), np.uint8)})
    rows, columns = np.indices((128, 128))
    square = (rows >= 80) & (rows < 120) & (columns >= 80) & (columns < 120)
    diagonal = (abs(rows - columns) <= 2) & (rows < 60) & (columns < 60)
    other = diagonal[:, ::-1]
    assert diagonal.sum() == other.sum() == 294
    found = []
    for shape, box, score in ((square, [80, 80, 40, 40], 0.5), (diagonal, [0, 0, 60, 60], 0.9),
                              (other, [68, 0, 60, 60], 0.8)):
        coded = mask.encode(np.asfortranarray(shape.astype(np.uint8)))
        found.append({'image_id': 10, 'category_id': 3, 'bbox': box, 'score': score,
                      'segmentation': {**coded, 'counts': coded['counts'].decode('ascii')}})
    split = CocoImages(tmp_path / 'val' / 'annotations.json', tmp_path / 'val')
    assert coco_scores(split, found, 'segm')[0]['ap_medium'] == pytest.approx(100)
    assert coco_scores(split, found, 'bbox')[0]['ap_medium'] == pytest.approx(100 / 3, abs=0.1)
    assert 'bbox' in found[0]


def test_no_detections_of_the_background(root):
    """Label 0 is of no category; masks stay with their boxes."""
    pytest.importorskip('pycocotools')
    from pycocotools import mask

    from scripts.detection.evaluation import detect
    split = CocoImages(root / 'val' / 'annotations.json', root / 'val')

    class Detector(torch.nn.Module):
        def forward(self, images):
            masks = torch.zeros(3, 1, *images[0].shape[1:])
            for i in range(3):
                masks[i, :, :4, :i + 2] = 1
            return [{'boxes': torch.tensor([[0., 0., i + 2, 4.] for i in range(3)]), 'masks': masks,
                     'labels': torch.tensor([0, 2, 1]), 'scores': torch.tensor([0.9, 0.8, 0.7])}]

    (_, found), = detect(Detector(), split, torch.device('cpu'), range(1), 1, nullcontext)
    assert [(d['category_id'], d['bbox']) for d in found] == [(7, [0, 0, 3, 4]), (3, [0, 0, 4, 4])]
    assert [mask.area(d['segmentation']) for d in found] == [12, 16]


def test_picture(root, tmp_path):
    """A box is drawn in its colour around the bright square, on both sides."""
    from scripts.detection.pictures import write_detections
    split = CocoImages(root / 'val' / 'annotations.json', root / 'val')
    entry = split.entries[0]
    found = [{'category_id': 3, 'bbox': entry.annotations[0]['bbox'], 'score': 0.75}]
    write_detections(tmp_path / 'a.png', 'v0', split.read(0), entry, found, split.categories)
    picture = np.asarray(Image.open(tmp_path / 'a.png').convert('RGB')).astype(int)
    assert picture.shape[1] > 2 * 490
    from scripts.training.images import colours
    near = (abs(picture - colours(2)[0]).max(2) < 30)
    half = picture.shape[1] // 2
    assert near[:, :half].sum() > 200 and near[:, half:].sum() > 200


@pytest.mark.parametrize('args, message', [
    (['--root', 'x', '--output', 'y'], '--root is given without --data: give one of trees, coco, folder'),
    (['--eval', 'x', '--lr', '1', '--short', '64'], 'recipe from the checkpoint: leave out --lr, --short'),
    (['--eval', 'x', '--check-data'], '--check-data and --eval are two things'),
    (['--eval', 'x', '--predict', 'y', '--split', 'val'], 'a checkpoint and images alone: leave out --split'),
    (['--predict', 'y', '--output', 'x'], '--predict wants a checkpoint: give --eval CHECKPOINT too'),
    ([], '--output is wanted')])
def test_command_line_errors(args, message, capsys):
    with pytest.raises(SystemExit):
        main(*args)
    assert message in capsys.readouterr().err


def recipe_of_args(*args, images=1000):
    pytest.importorskip('pycocotools')
    from scripts.detection.train import parse_args, recipe_of
    return recipe_of(parse_args(['--output', 'x', *args]), images)[0]


def test_defaults():
    """Presets, and what is frozen with initial weights."""
    pytest.importorskip('pycocotools')
    from scripts.detection.train import parse_args, recipe_of
    args = parse_args(['--output', 'x'])
    recipe, config = recipe_of(args, 1000)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.steps, recipe.warmup) == (
        'sgd', 0.02, 1e-4, 750, 75)
    assert (config['frozen_stages'], config['frozen_bn'], config['short']) == (0, False, [800])
    args = parse_args(['--output', 'x', '--preset', 'adamw', '--init', 'default', '--batch', '8', '--clip', '1'])
    recipe, config = recipe_of(args, 118_000)
    assert (recipe.optimizer, recipe.lr, recipe.clip, recipe.warmup) == ('adamw', 1e-4, 1.0, 500)
    assert (config['frozen_stages'], config['frozen_bn']) == (1, True)
    assert parse_args(['--output', 'x', '--init', 'a', '--no-frozen-bn']).frozen_bn is False


@pytest.mark.parametrize('args, rate', [
    (['--batch', '2'], 0.0025), (['--batch', '2', '--lr', '0.01'], 0.01), (['--preset', 'adamw', '--batch', '2'], 1e-4),
    (['--preset', 'adamw', '--batch', '1', '--lr', '2e-4'], 2e-4), (['--batch', '8', '--optimizer', 'adamw'], 0.02)])
def test_learning_rate(args, rate):
    """One that is given is the rate, and SGD's usual one goes with the batch."""
    assert recipe_of_args(*args).lr == rate


@pytest.mark.parametrize('args, epochs, milestones', [
    ([], 12, (8, 11)), (['--epochs', '3'], 3, (2, 2.75)), (['--epochs', '3', '--milestones', '1'], 3, (1,)),
    (['--epochs', '3', '--milestones'], 3, ()), (['--steps', '300'], 12, (8, 11)),
    (['--steps', '300', '--batch', '10', '--milestones', '1', '2'], 3, (1, 2))])
def test_milestones(args, epochs, milestones):
    """In proportion to the epochs, unless they are given."""
    recipe = recipe_of_args(*args)
    recipe.check()
    assert (recipe.epochs, recipe.milestones) == (epochs, milestones)


def test_milestones_with_steps():
    """Given ones are epochs of the images, and none may lie behind the end; the usual ones are parts of the run."""
    args = ['--steps', '300', '--batch', '10']
    assert recipe_of_args(*args, '--milestones', '1', '2').falls == [100, 200]
    assert recipe_of_args(*args).falls == [200, 275]
    with pytest.raises(ValueError, match='above 0 and up to the 3 epochs of the 300 steps, got 8, 11'):
        recipe_of_args(*args, '--milestones', '8', '11').check()


def test_data_errors(root, tmp_path, capsys):
    """A wrong annotation is told with its file and id, before anything is written; --check-data tells it too."""
    made, pictures = content('val')
    made['annotations'][0]['bbox'][2] = 900
    write(root, 'val', made, pictures)
    for args in ([*OPTIONS, '--output', tmp_path / 'out'], ['--data', 'folder', '--check-data']):
        assert main(*args, '--root', root) == 1
        err = capsys.readouterr().err
        assert err.startswith('detection.train: ') and f'{root}/val/annotations.json: annotation 1 of image 10' in err
    assert not (tmp_path / 'out').exists()
    assert main('--data', 'folder', '--check-data', '--anyway', '--root', root) == 0
    assert main(*OPTIONS, '--output', root / 'val' / 'v0.png', '--root', root, '--anyway') == 1
    assert f'--output wants a folder, and {root}/val/v0.png is a file' in capsys.readouterr().err
    assert main(*OPTIONS, '--output', tmp_path / 'out', '--root', root, '--anyway', '--detector', 'mask_rcnn',
                '--fadc', 'eps=-1') == 1
    assert 'eps' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_check_for_masks(tmp_path, capsys):
    """Data without masks are those of a detector of boxes."""
    args = ['--data', 'folder', '--check-data', '--root', write_folder(tmp_path, masks=False)]
    assert main(*args) == 0
    assert main(*args, '--detector', 'mask_rcnn') == 1
    assert 'annotation 1 of image 10 (t0.png) has no segmentation' in capsys.readouterr().err


def test_without_pycocotools(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    from scripts.detection import train as train_detector
    args = [*OPTIONS, '--root', root, '--output', tmp_path / 'out']
    assert train_detector.main([str(a) for a in args]) == 1
    assert "Detection needs pycocotools: pip install -e '.[detection]'" in capsys.readouterr().err
