"""scripts/studies/dilation_frequency.py: rank correlation, its interval, and what is undefined."""
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fadc_timm.checkpoints import write_folder
from fadc_timm.layers import FADConv2d
from fadc_timm.losses import dilation_frequency_loss, record_dilations
from scripts.studies import dilation_frequency
from scripts.studies.rank_correlation import bootstrap, spearman
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')
MODEL = 'test_resnet_fadc'


def test_spearman():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1, 5, 6))
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -a ** 3) == pytest.approx(-1)
    # without ties the textbook's 1 - 6 sum d^2 / (n^3 - n)
    b = rng.normal(size=(1, 5, 6))
    d = a.ravel().argsort().argsort() - b.ravel().argsort().argsort()
    assert spearman(a, b) == pytest.approx(1 - 6 * (d ** 2).sum() / (30 ** 3 - 30))
    two = np.concatenate([a, a])
    assert spearman(two, np.concatenate([a, -a])) == pytest.approx(0)
    # a constant map has no correlation, which is not a correlation of zero
    assert math.isnan(spearman(a * 0 + 1, a)) and math.isnan(spearman(a, a * 0))
    assert math.isnan(spearman(a[:, :1, :1], a[:, :1, :1])) and math.isnan(spearman(*[a[:, :0]] * 2))
    assert spearman(two, np.concatenate([a, a * 0])) == pytest.approx(1)


def test_bootstrap():
    values = np.random.default_rng(1).normal(0.3, 0.2, 100)
    mean, low, high = bootstrap(np.append(values, np.nan), 2000)
    assert mean == pytest.approx(values.mean())
    error = values.std() / 10
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert all(math.isnan(v) for v in bootstrap(np.array([np.nan]), 10))


@pytest.mark.parametrize('sign', [1, -1])
def test_sign_and_the_loss_agree(sign):
    """Training by the objective makes the correlation negative, against it positive; before, it is undefined."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(1, 3, 24, 32)).astype(np.float32)
    pixels[..., :16] = np.linspace(0, 1, 24)[:, None]
    x = torch.from_numpy(pixels)
    model = torch.nn.Sequential(FADConv2d(3, 3, 3, padding=1, dilation=2, freq_select=False)).eval()
    initial = torch.nn.Sequential(FADConv2d(3, 3, 3, padding=1, dilation=2)).eval()
    optimizer = torch.optim.SGD(model[0].ada_dr.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        with record_dilations(model) as records:
            model(x)
        (sign * dilation_frequency_loss(records)).backward()
        optimizer.step()
    with torch.no_grad(), record_dilations(model) as records:
        model(x)
    rows, maps = dilation_frequency.measure({'trained': model, 'initial': initial}, [x, x.flip(3)], 2, 50)
    table = {(r['state'], r['features']): r for r in rows}
    assert set(table) == {
        ('random', 'selected'), *((s, f) for s in ('trained', 'initial') for f in ('selected', 'input'))}
    np.testing.assert_array_equal(maps['0'][0].powers['selected'], records[0].power[0].numpy())  # one definition
    np.testing.assert_array_equal(maps['0'][0].dilation, records[0].dilation[0].numpy())
    before = table['initial', 'selected']
    assert before['rho'] == before['low'] == before['inner_rho'] == 'undefined' and before['images_defined'] == '0'
    assert before['dilation_min'] == before['dilation_max'] == '2.000'
    expected = np.mean([spearman(m.dilation, m.powers['selected']) for m in maps['0']])
    assert float(table['trained', 'selected']['rho']) == pytest.approx(expected, abs=6e-4)
    assert sign * float(table['trained', 'selected']['high']) < -0.2 or sign < 0
    assert sign * float(table['trained', 'selected']['low']) < -0.2 or sign > 0
    assert table['trained', 'selected']['rho'] == table['trained', 'input']['rho']  # there is no FreqSelect
    assert table['random', 'selected']['images_defined'] == '2'


def test_command(tmp_path, capsys):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for i, size in enumerate(((100, 60), (64, 96))):
        noise = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)
        noise[:, :30] = 90
        Image.fromarray(noise).save(photos / f'{i}.png')
    (photos / 'notes.txt').write_text('no image')
    out = tmp_path / 'results' / 'a.csv'
    args = ['--images', str(photos), '--size', '96', '--draws', '2', '--resamples', '20', '--output', str(out)]
    assert dilation_frequency.main(args) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(p.name for p in out.parent.iterdir()) == ['a.csv', 'a.png'] and len(rows) == 5 * 5
    assert {r['images'] for r in rows} == {'2 images'}
    for r in rows:
        assert (r['rho'] == 'undefined') == (r['state'] == 'initial')
        if r['state'] == 'trained':
            assert -1 <= float(r['low']) <= float(r['rho']) <= float(r['high']) <= 1
    with Image.open(out.with_suffix('.png')) as image:
        assert image.width == 1600
    assert 'layer2.0.conv1' in capsys.readouterr().out

    # a checkpoint that is the model at its start: undefined throughout
    save_file(timm.create_model(MODEL).state_dict(), tmp_path / 'start.safetensors')
    assert dilation_frequency.main([*args, '--draws', '0', '--checkpoint', str(tmp_path / 'start.safetensors')]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {r['rho'] for r in rows} == {'undefined'} and {r['model'] for r in rows} == {f'{MODEL} (start.safetensors)'}

    # the folder of a model, with its options
    options = dict(fadc_stages=(False, False, False, True))
    folder = write_folder(off_identity(timm.create_model(MODEL, **options)), tmp_path / 'own', model_args=options)
    assert dilation_frequency.main([*args, '--draws', '0', '--checkpoint', str(folder)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {r['model'] for r in rows} == {f'{MODEL} (own)'} and {r['layer'][:6] for r in rows} == {'layer4'}
    for r in rows:
        assert (r['rho'] == 'undefined') == (r['state'] == 'initial')
    assert dilation_frequency.main([*args, '--checkpoint', str(folder), '--model', 'resnet18_fadc']) == 2
    assert f'holds the model {MODEL}, not resnet18_fadc' in capsys.readouterr().err


def test_images_of_16_bits(tmp_path):
    """As those of 8 bits; others are refused by name."""
    model = timm.create_model(MODEL)
    grey = np.random.default_rng(0).integers(0, 255, (64, 96), np.uint8)
    files = [tmp_path / 'a.png', tmp_path / 'b.png']
    for path, values in zip(files, (grey, grey.astype(np.uint16) * 257)):
        Image.fromarray(values).save(path)
    a, b = dilation_frequency.read_images(files, model, 96)
    assert torch.equal(a, b) and a.std() > 0.1
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / 'c.tif')
    with pytest.raises(ValueError, match='c.tif: its floats go from'):
        next(iter(dilation_frequency.read_images([tmp_path / 'c.tif'], model, 96)))


def test_command_refuses(tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'cut.safetensors').write_bytes(b'\0' * 50)
    for args, message in (
            (['--images', str(tmp_path / 'nothing')], 'There is no image or folder'),
            (['--images', str(tmp_path / 'empty')], 'There are no images in'),
            (['--checkpoint', str(tmp_path / 'cut.safetensors')], 'cannot be read as weights: it is cut off')):
        assert dilation_frequency.main([*args, '--output', str(tmp_path / 'a.csv')]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        dilation_frequency.main(['--tiles', '1'])
    assert not (tmp_path / 'a.csv').exists()


def test_tiles_are_held_out(monkeypatch):
    """Tiles of 80 pixels, whatever the input's size, normalised as the model wants it."""
    rgb = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)

    class Tiles:
        centres = np.array([[50, 60], [100, 100], [120, 200]])

        def __len__(self):
            return 3

    monkeypatch.setattr(dilation_frequency, 'load_rasters', lambda data: (rgb, None, None))
    monkeypatch.setattr(dilation_frequency, 'split_tiles', lambda zones: (None, Tiles(), None))
    model = timm.create_model(MODEL)
    tiles = list(dilation_frequency.tile_images(2, model, 80, Path('x')))
    assert [t.shape for t in tiles] == [(1, 3, 80, 80)] * 2
    for tile, (y, x) in zip(tiles, ((50, 60), (120, 200))):
        expected = torch.from_numpy(rgb[y - 40:y + 40, x - 40:x + 40].copy()).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(tile, (expected - 0.5) / 0.5, atol=1e-6, rtol=0)
    assert next(iter(dilation_frequency.tile_images(2, model, None, Path('x')))).shape == (1, 3, 160, 160)
