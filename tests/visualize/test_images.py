"""Photographs of every mode are read as the picture that a viewer shows, or refused by name."""
import numpy as np
import pytest
from PIL import Image

from fadc_timm import visualize
from fadc_timm.visualize import read_image, to_rgb

# a ramp that is its own palette, and no two rows or columns of which are alike
GREY = np.add.outer(np.arange(6) * 40, np.arange(8) * 5).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def grey_of(image):
    pixels = np.asarray(image)
    assert image.mode == 'RGB' and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize('name, pixels', [
    ('a.png', GREY.astype(np.uint16) * 257), ('a.tif', GREY.astype(np.uint16) * 257),
    ('a.tif', (GREY / 255).astype(np.float32)), ('a.png', GREY), ('a.pgm', GREY.astype(np.uint16) * 257),
], ids=['16 bits', '16 bits, TIFF', 'float', '8 bits', '16 bits, PGM'])
def test_grey_is_scaled_by_its_range(name, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    np.testing.assert_array_equal(grey_of(read_image(tmp_path / name)), GREY)


def test_16_bits_of_big_endian_files(tmp_path):
    """Pillow has a mode of its own for them."""
    values = GREY.astype('>u2') * 257
    image = Image.frombytes('I;16B', GREY.shape[::-1], values.tobytes())
    np.testing.assert_array_equal(grey_of(to_rgb(image)), GREY)


@pytest.mark.parametrize('name, image', [
    ('a.png', Image.fromarray(RGB).quantize(48)), ('a.gif', Image.fromarray(RGB).quantize(48)),
    ('a.tif', Image.fromarray(RGB).convert('CMYK')), ('a.png', Image.fromarray(GREY > 100)),
], ids=['palette', 'GIF', 'CMYK', '1 bit'])
def test_modes_of_8_bits(name, image, tmp_path):
    image.save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert read.mode == 'RGB' and np.asarray(read).std() > 10
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image.convert('RGB')))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'PA', 'La', 'RGBa', 'P'])
def test_transparent_pixels_lie_on_white(mode, tmp_path):
    """Not the colour that happens to be stored under them, most often black."""
    base = Image.fromarray(RGB if mode in ('RGBA', 'RGBa') else GREY)
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :3] = 0
    if mode == 'P':
        image = Image.fromarray(np.where(alpha > 0, 1, 0).astype(np.uint8)).convert('P')
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(tmp_path / 'p.png', transparency=0)
        pixels = np.asarray(read_image(tmp_path / 'p.png'))
        assert (pixels[:, 3:] == (10, 20, 30)).all()
    else:
        straight = {'La': 'LA', 'RGBa': 'RGBA'}.get(mode, mode)
        image = base.convert('P') if mode == 'PA' else base
        image = image.convert(straight)
        image.putalpha(Image.fromarray(alpha))
        pixels = np.asarray(to_rgb(image.convert(mode)))
        np.testing.assert_array_equal(pixels[:, 3:], np.asarray(base.convert('RGB'))[:, 3:])
    assert (pixels[:, :3] == 255).all()


@pytest.mark.parametrize('pixels, name', [(RGB, 'a.jpg'), (GREY.astype(np.uint16) * 257, 'a.png'), (RGB, 'a.webp')])
def test_upright(pixels, name, tmp_path):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / name, exif=exif, **({} if name.endswith('png') else dict(quality=100)))
    turned = np.asarray(read_image(tmp_path / name)).astype(int)
    expected = np.asarray(to_rgb(Image.fromarray(np.rot90(pixels, -1).copy()))).astype(int)
    assert turned.shape == expected.shape == (8, 6, 3)
    assert abs(turned - expected).mean() < (1e-9 if name.endswith('png') else 30)


@pytest.mark.parametrize('name', ['a.gif', 'a.png', 'a.tif', 'a.webp'])
def test_several_frames_are_refused(name, tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match='2 frames; wanted is one image'):
        read_image(tmp_path / name)


def test_a_phones_picture_with_its_preview(tmp_path):
    """The first frame of an MPO is the photograph."""
    image = Image.fromarray(np.full((16, 16, 3), (200, 40, 90), np.uint8))
    image.save(tmp_path / 'a.mpo', save_all=True, append_images=[image.resize((8, 8))])
    with Image.open(tmp_path / 'a.mpo') as opened:
        assert opened.n_frames == 2
    assert abs(np.asarray(read_image(tmp_path / 'a.mpo')).astype(int) - (200, 40, 90)).max() < 5


@pytest.mark.parametrize('image, words', [
    (Image.fromarray(GREY.astype(np.float32)), 'floats go from 0 to 235; wanted are 0 to 1'),
    (Image.fromarray(np.full((2, 2), np.nan, np.float32)), 'floats go from nan'),
    (Image.fromarray(GREY.astype(np.int32)), 'Pillow mode I has no known range'),
    (Image.new('LAB', (3, 2)), 'Pillow mode LAB'),
], ids=['float', 'nan', 'int32', 'LAB'])
def test_refused_by_name(image, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        to_rgb(image)
    image.save(tmp_path / 'a.tif')
    with pytest.raises(ValueError, match=words):
        read_image(tmp_path / 'a.tif')


@pytest.mark.parametrize('image, words', [
    (GREY.astype(np.uint16), 'uint8 or float, got uint16'),
    (GREY.astype(np.float32), r'\[0, 1\], got 0 to 235'),
    (np.full((4, 4, 3), np.nan), r'\[0, 1\], got nan'),
    (np.zeros((4, 4, 4), np.uint8), r'\(H, W, 3\), got \(4, 4, 4\)'),
    (np.zeros((3, 4, 4)), r'got \(3, 4, 4\)'),
])
def test_figure_refuses(image, words):
    with pytest.raises(ValueError, match=words):
        visualize.figure(image, [])


def test_figure_takes_images_of_every_mode():
    palette = Image.fromarray(RGB).quantize(48)
    for image in (palette, palette.convert('CMYK'), Image.fromarray(GREY.astype(np.uint16) * 257)):
        fig = visualize.figure(image, [])
        shown = fig.axes[0].images[0].get_array()
        np.testing.assert_allclose(shown * 255, np.asarray(to_rgb(image)), atol=1e-9)
