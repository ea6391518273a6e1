"""Pictures of a segmentation: labels over an image, and image, truth and prediction with a legend."""
import numpy as np
import pytest
from PIL import Image

from scripts.segmentation.pictures import overlay, prediction_figure, write_prediction
from scripts.training.images import colours
from tests.support.segmentation_cases import mask_of, picture_of

PALETTE = np.array([[255, 0, 0], [0, 0, 255], [0, 255, 0]], dtype=np.uint8)


def test_overlay():
    image, mask = picture_of(0), mask_of([0, 1, 255])
    result = overlay(image, mask, PALETTE[:2], 0.25)
    assert result.dtype == np.uint8 and np.array_equal(result[mask == 255], image[mask == 255])
    for label in (0, 1):
        wanted = 0.75 * image[mask == label] + 0.25 * PALETTE[label]
        assert np.abs(result[mask == label] - wanted).max() <= 0.5
    with pytest.raises(ValueError, match='palette of 2'):
        overlay(image, mask_of([2]), PALETTE[:2])
    with pytest.raises(ValueError, match='mask of an image'):
        overlay(image, mask[1:], PALETTE)


def test_prediction():
    """Three panels; the legend has the classes that occur in either, with their colours, and what is ignored."""
    image, truth, prediction = picture_of(0), mask_of([0, 0, 1, 255]), mask_of([0, 2, 1, 1])
    fig = prediction_figure('town/b', image, truth, prediction, ('road', 'sky', 'tree'), PALETTE)
    axes = fig.axes
    assert [ax.get_title() for ax in axes] == ['town/b', 'truth', 'prediction, 66.7 % right']
    shown = [ax.images[0].get_array() for ax in axes]
    expected = overlay(image, truth, PALETTE)
    expected[truth == 255] = 128
    assert all(map(np.array_equal, shown, (image, expected, overlay(image, prediction, PALETTE))))
    colour = shown[1][truth == 0].mean(0)
    assert np.abs(colour - PALETTE[0]).max() < 26  # that of the legend, nearly
    legend, = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ['road', 'sky', 'tree', '(ignored)']
    assert np.allclose([patch.get_facecolor()[:3] for patch in legend.get_patches()[:3]], PALETTE / 255)
    fig = prediction_figure('truth', image, mask_of([1]), mask_of([1]), ('road', 'sky', 'tree'), PALETTE)
    assert [ax.get_title() for ax in fig.axes] == ['truth', 'truth', 'prediction, 100.0 % right']
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['sky']
    fig = prediction_figure('a', image, mask_of([255]), mask_of([1]), ('road', 'sky', 'tree'), PALETTE)
    assert fig.axes[2].get_title() == 'prediction'


@pytest.mark.parametrize('size', [(32, 48), (2100, 300), pytest.param((600, 1000), marks=pytest.mark.sweep)])
def test_written(size, tmp_path):
    """No picture's legend, of 150 long names, is cut off, and none of its panels is smaller than the image."""
    image = picture_of(0, *size)
    labels = np.resize(np.arange(150, dtype=np.uint8), size)
    path = tmp_path / 'new' / 'x.png'
    names = [f'class of a long name {i}' for i in range(150)]
    write_prediction(path, 'x', image, labels, labels, names, colours(150))
    assert [p.name for p in path.parent.iterdir()] == ['x.png']
    fig = prediction_figure('x', image, labels, labels, names, colours(150))
    fig.canvas.draw()
    box = fig.legends[0].get_window_extent()
    width, height = fig.canvas.get_width_height()
    panels = [ax.get_window_extent() for ax in fig.axes]
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 < panels[0].y0 + 2
    assert panels[0].x1 < panels[1].x0 and panels[1].x1 < panels[2].x0 and panels[2].x1 <= width
    assert panels[0].width >= min(1, 900 / max(size)) * size[1] - 1
    assert Image.open(path).size == (width, height)
