"""The transforms of segmentation data: image and mask stay together, and the random number generator decides all."""
import colorsys

import numpy as np
import pytest
import torch

from scripts.segmentation.data import IGNORE
from scripts.segmentation.metrics import ConfusionMatrix
from scripts.segmentation.transforms import (
    EvalTransform,
    TrainTransform,
    adjust_saturation,
    fitted_size,
    photometric_distortion,
)
from tests.support.segmentation_cases import mask_of, picture_of

pytestmark = pytest.mark.usefixtures('one_thread')

PLAIN = dict(scale=(1, 1), flip=0, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))


def smooth_pair(height=40, width=56):
    """Image whose red says the label: 7 areas with straight borders."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 3:] = 1
    mask[height // 2:, :] += 2
    mask[5:15, 30:50] = 6
    image = np.stack([mask * 40, 255 - mask * 30, np.zeros_like(mask)], -1)
    return image, mask


class TestTransforms:
    @pytest.mark.parametrize('seed', range(8))
    def test_mask_follows_image(self, seed):
        """Resized, cropped, flipped: inside areas, away from blended borders, the colour is that of the label."""
        image, mask = smooth_pair()
        transform = TrainTransform(48, 7, photometric=False, mean=(0, 0, 0), std=(1, 1, 1))
        x, y = transform(image, mask, np.random.default_rng(seed))
        assert x.shape == (3, 48, 48) and x.dtype == torch.float32
        assert y.shape == (48, 48) and y.dtype == torch.int64
        there = y != IGNORE
        assert (x[:, ~there] == 0).all()
        exact = (x[0] * 255 - y * 40).abs() < 1
        assert exact[there].float().mean() > 0.8
        # Where it is not, a border of areas is next to it, if only in what was cropped off.
        flat = torch.nn.functional.max_pool2d(y[None].float(), 5, 1, 2) == -torch.nn.functional.max_pool2d(
            -y[None].float(), 5, 1, 2)
        assert exact[1:-1, 1:-1][(flat[0] & there)[1:-1, 1:-1]].all()

    @pytest.mark.parametrize('factor', (3 / 5, 5 / 3))  # with these no sample lies just between two pixels
    def test_resize_is_centred(self, factor):
        """A step lands at the same column of image and mask, wherever it is: half a pixel of shift would show."""
        width = round(60 * factor)
        transform = TrainTransform(width, 2, **{**PLAIN, 'scale': (factor, factor), 'cat_max_ratio': 1})
        for step in range(1, 60):
            mask = np.zeros((5, 60), dtype=np.uint8)
            mask[:, step:] = 1
            x, y = transform(np.repeat((mask * 255)[..., None], 3, 2), mask, np.random.default_rng(0))
            assert torch.equal((x[0, 0] > 0.5).long(), y[0]) and abs(y[0].sum() - (60 - step) * factor) < 0.51

    def test_flip(self):
        image, mask = smooth_pair(40, 40)
        plain = TrainTransform(40, 7, **PLAIN)(image, mask, np.random.default_rng(0))
        flipped = TrainTransform(40, 7, **{**PLAIN, 'flip': 1})(image, mask, np.random.default_rng(0))
        assert np.array_equal(plain[1], mask)
        assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped))
        rng = np.random.default_rng(0)
        half = TrainTransform(40, 7, **{**PLAIN, 'flip': 0.5})
        count = sum(torch.equal(half(image, mask, rng)[1], flipped[1]) for _ in range(200))
        assert 70 < count < 130

    def test_rng_decides_all(self):
        image, mask = smooth_pair(80, 90)
        image = (image // 2 + picture_of(0, 80, 90) // 2).astype(np.uint8)
        kept = image.copy(), mask.copy()
        transform = TrainTransform(32, 7)
        torch.manual_seed(1)
        first = [transform(image, mask, np.random.default_rng(s)) for s in range(6)]
        torch.manual_seed(2)
        np.random.seed(3)
        again = [transform(image, mask, np.random.default_rng(s)) for s in range(6)]
        assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))
        assert not any(torch.equal(first[i][0], first[j][0]) for i in range(6) for j in range(i))
        assert np.array_equal(image, kept[0]) and np.array_equal(mask, kept[1])

    def test_torch_rng_is_left_alone(self):
        image, mask = smooth_pair()
        state = torch.get_rng_state()
        TrainTransform(32, 7)(image, mask, np.random.default_rng(0))
        assert torch.equal(state, torch.get_rng_state())

    def test_scale(self):
        """A square's side follows the factor, which is spread over its range."""
        mask = np.full((40, 40), IGNORE, dtype=np.uint8)
        mask[:, :] = 1
        transform = TrainTransform(90, 3, cat_max_ratio=1, photometric=False, flip=0)
        sides = [int((transform(np.zeros((40, 40, 3), np.uint8), mask, np.random.default_rng(s))[1] == 1).sum()) ** 0.5
                 for s in range(200)]
        assert 20 <= min(sides) < 23 and 77 < max(sides) <= 80
        assert abs(np.mean(sides) - 50) < 3

    def test_cat_max_ratio(self):
        """Two thirds of the places show one class only: ten tries hardly ever end in one."""
        mask = np.zeros((16, 96), dtype=np.uint8)
        mask[:, 48:] = 1
        image = np.zeros((16, 96, 3), dtype=np.uint8)

        def largest(ratio):
            transform = TrainTransform(16, 2, **{**PLAIN, 'cat_max_ratio': ratio})
            return np.array([
                transform(image, mask, np.random.default_rng(s))[1].flatten().bincount().max().item() / 256
                for s in range(300)])

        assert (largest(1) >= 0.75).mean() > 0.8
        # 7 of 81 windows are below 0.75: the chance that ten tries miss is (74 / 81)^10 = 0.40
        assert abs((largest(0.75) >= 0.75).mean() - (74 / 81) ** 10) < 0.08

    def test_cat_max_ratio_counts_no_ignored_pixels(self):
        """Ignored pixels are no class: an area of one class among them stays one class."""
        mask = np.full((16, 64), IGNORE, dtype=np.uint8)
        mask[:, 30:32], mask[:, 32:34] = 0, 1
        transform = TrainTransform(16, 2, **PLAIN)
        labels = [transform(np.zeros((16, 64, 3), np.uint8), mask, np.random.default_rng(s))[1] for s in range(50)]
        assert sum(set(y.unique().tolist()) == {0, 1, IGNORE} for y in labels) > 40

    def test_nothing_labelled(self):
        mask = np.full((20, 20), IGNORE, dtype=np.uint8)
        _, y = TrainTransform(16, 2)(np.zeros((20, 20, 3), np.uint8), mask, np.random.default_rng(0))
        assert (y == IGNORE).all()

    def test_padding(self):
        image, mask = smooth_pair(10, 14)
        x, y = TrainTransform(20, 7, **{**PLAIN, 'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.3, 0.4)})(
            np.maximum(image, 1), mask % 7, np.random.default_rng(0))
        assert (y[10:] == IGNORE).all() and (y[:, 14:] == IGNORE).all() and (y[:10, :14] != IGNORE).all()
        assert (x[:, 10:] == 0).all() and (x[:, :, 14:] == 0).all()
        counted = ConfusionMatrix(7)
        counted.update(np.zeros((20, 20), dtype=int), y.numpy())
        assert counted.matrix.sum() == 140

    def test_normalisation(self):
        image, mask = picture_of(0), mask_of([0, 1])
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        wanted = torch.tensor((image / 255 - mean) / std).permute(2, 0, 1).float()
        x, y = EvalTransform(mean, std)(image, mask)
        assert torch.allclose(x, wanted, atol=1e-6) and y.dtype == torch.int64 and np.array_equal(y, mask)
        x, _ = TrainTransform(8, 2, **{**PLAIN, 'mean': mean, 'std': std})(image, mask, np.random.default_rng(0))
        assert torch.allclose(x[:, :6], wanted, atol=1e-6)

    def test_fit(self):
        assert fitted_size((683, 1024), (2048, 512)) == [512, 768]
        assert fitted_size((1024, 683), (2048, 512), 0.5) == [384, 256]
        assert fitted_size((100, 1000), (2048, 512)) == [205, 2048]
        assert fitted_size((7, 5), None, 1.5) == [11, 8]
        assert fitted_size((1, 100), None, 0.1) == [1, 10]
        image, mask = smooth_pair(40, 60)
        x, y = EvalTransform(fit=(90, 30))(image, mask)
        assert x.shape == (3, 30, 45) and y.shape == (40, 60)
        y = TrainTransform(90, 7, **PLAIN, fit=(90, 30))(image, mask, np.random.default_rng(0))[1]
        assert (y != IGNORE).sum() == 30 * 45

    @pytest.mark.parametrize('dtype', (np.uint8, np.int64, np.int32))
    def test_mask_dtypes(self, dtype):
        image, mask = smooth_pair()
        one, other = (TrainTransform(32, 7)(image, m, np.random.default_rng(0)) for m in (mask, mask.astype(dtype)))
        assert torch.equal(one[1], other[1])

    def test_photometric(self):
        """Every change stays in its published range; half of the images get each."""
        grey, rng = torch.full((3, 1, 1), 0.5), np.random.default_rng(0)
        values = torch.stack([photometric_distortion(grey, rng).flatten() for _ in range(2000)])
        assert torch.allclose(values[:, :1], values, atol=1e-5)  # grey stays grey
        v = values[:, 0]
        low, high = (0.5 - 32 / 255) * 0.5, (0.5 + 32 / 255) * 1.5
        assert low <= v.min() < low + 0.1 and high - 0.1 < v.max() <= high
        assert 0.22 < (v - 0.5).abs().lt(1e-6).float().mean() < 0.28  # neither brightness nor contrast

    def test_hue(self, monkeypatch):
        """Up to 36 degrees either way, at constant saturation and value."""
        import scripts.segmentation.transforms as module
        monkeypatch.setattr(module, 'BRIGHTNESS', 0)
        monkeypatch.setattr(module, 'CONTRAST', (1, 1))
        monkeypatch.setattr(module, 'SATURATION', (1, 1))
        colour = torch.tensor(colorsys.hsv_to_rgb(0.4, 0.7, 0.8)).view(3, 1, 1)
        rng = np.random.default_rng(0)
        colours = [photometric_distortion(colour, rng).flatten().tolist() for _ in range(200)]
        hsv = np.array([colorsys.rgb_to_hsv(*c) for c in colours])
        shift = 360 * (hsv[:, 0] - 0.4)
        assert np.allclose(hsv[:, 1:], (0.7, 0.8), atol=1e-3)
        assert -36.1 < shift.min() < -30 and 30 < shift.max() < 36.1
        assert 0.35 < (np.abs(shift) < 0.01).mean() < 0.65

    @pytest.mark.parametrize('factor', (0, 0.5, 1, 1.5, 9))
    def test_saturation(self, factor):
        image = torch.rand(3, 5, 5)
        image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0, 1, torch.tensor([1.0, 0, 0])
        result = adjust_saturation(image, factor)
        for before, after in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*before)
            assert np.allclose(after, colorsys.hsv_to_rgb(h, min(s * factor, 1), v), atol=1e-5)

    def test_photometric_leaves_the_mask(self):
        image, mask = smooth_pair(40, 40)
        y = TrainTransform(40, 7, **{**PLAIN, 'photometric': True})(image, mask, np.random.default_rng(0))[1]
        assert np.array_equal(y, mask)

    @pytest.mark.parametrize('bad', (
        dict(crop=0), dict(classes=0), dict(classes=256), dict(scale=(0, 1)), dict(scale=(2, 1)),
        dict(cat_max_ratio=0), dict(cat_max_ratio=1.1), dict(flip=-0.1), dict(flip=2)))
    def test_bad_arguments(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainTransform(**{'crop': 8, 'classes': 2, **bad})

    def test_bad_pairs(self):
        image, mask = smooth_pair()
        rng = np.random.default_rng(0)
        for args, words in (
                ((image, mask[1:]), 'mask of an image'), ((image / 255, mask), 'float64'),
                ((image[..., 0], mask), r'\(40, 56\)'), ((image, mask + 1), 'label 7 in a mask of 7 classes')):
            with pytest.raises(ValueError, match=words):
                TrainTransform(64, 7, scale=(1, 1))(*args, rng)
        with pytest.raises(ValueError, match='mask of an image'):
            EvalTransform()(image, mask[1:])
