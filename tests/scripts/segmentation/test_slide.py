"""Segmentation of an image in overlapping windows."""
import pytest
import torch

from scripts.segmentation.slide import slide, windows

pytestmark = pytest.mark.usefixtures('one_thread')


def test_windows():
    assert windows(10, 4, 3) == [0, 3, 6] and windows(11, 4, 3) == [0, 3, 6, 7]
    assert windows(4, 4, 3) == [0] and windows(3, 4, 3) == [0]


@pytest.mark.parametrize('size', [(7, 12), (3, 9), (6, 6)])
def test_slide(size):
    """Against the mean over windows computed pixel by pixel; the model tells where in its window a pixel is."""
    crop, stride = 6, 4
    ramp = torch.arange(crop * crop, dtype=torch.float32).reshape(1, 1, crop, crop)

    def model(x):
        return torch.cat([x[:, :1] + ramp, x[:, 1:2] * ramp], 1)

    image = torch.randn(3, *size)
    padded = torch.zeros(3, max(size[0], crop), max(size[1], crop))
    padded[:, :size[0], :size[1]] = image
    values = [[[] for _ in range(padded.shape[2])] for _ in range(padded.shape[1])]
    for top in windows(padded.shape[1], crop, stride):
        for left in windows(padded.shape[2], crop, stride):
            out = model(padded[None, :, top:top + crop, left:left + crop])[0]
            for i in range(crop):
                for j in range(crop):
                    values[top + i][left + j].append(out[:, i, j])
    expected = torch.stack([torch.stack([torch.stack(v).mean(0) for v in row], 1) for row in values], 1)
    for batch in (1, 4):
        got = slide(model, image, crop, stride, batch)
        torch.testing.assert_close(got, expected[:, :size[0], :size[1]])
    with pytest.raises(ValueError, match='stride of the windows must be from 1 to the crop of 6, got 7'):
        slide(model, image, crop, 7)
