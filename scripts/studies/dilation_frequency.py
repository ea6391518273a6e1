#!/usr/bin/env python3
"""Does AdaDR do what the paper says: small dilations where the features have high frequencies, large ones elsewhere?

    python -m scripts.studies.dilation_frequency                             # the default model, held-out tiles
    python -m scripts.studies.dilation_frequency --images PHOTOS --size 576  # its maps of photographs
    python -m scripts.studies.dilation_frequency --model resnet50_fadc --checkpoint tuned.safetensors --images FOLDER

For each FADC layer: Spearman's rank correlation between the dilation and the local high-frequency power
(fadc_timm.losses.high_frequency_power) over the positions of an image, then the mean over images with a bootstrap
interval over images (of these images: neighbouring tiles look alike). The paper's objective wants it negative. On maps
hardly wider than the power's window of 7 pixels, the correlation is mostly that of their middle with their border.
Rows of the table:

* state `trained`: the weights that were asked for; `initial`: the same model as timm.create_model builds it, where the
  dilation is constant and the correlation undefined; `random`: the trained model's features under an AdaDR with random
  weights, which is what any readout of these features would show: mean, and the 2.5 and 97.5 percentiles, of --draws.
* features `selected`: the power of what AdaDR reads and the layer samples, FreqSelect's output, as in the loss;
  `input`: that of the layer's input.
* `inner`: without the positions at the border, where AdaDR sees the padding.
"""
import argparse
import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import fadc_timm  # noqa: F401  registers the models
from fadc_timm.checkpoints import load_checkpoint
from fadc_timm.layers.hooks import LayerCall, watch_layers
from fadc_timm.losses import high_frequency_power, power_at_outputs
from fadc_timm.models._family import architecture_name
from fadc_timm.visualize import read_image, save
from scripts.bluemarble.globe import CACHE_DIR, CELL, TILE, crop, load_rasters, split_tiles
from scripts.results import RESULTS, write_csv
from scripts.studies.rank_correlation import bootstrap, over_draws, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_MODEL = 'test_resnet_fadc'
OUTPUT = RESULTS / 'dilation_frequency.csv'
FEATURES = ('selected', 'input')
SUFFIXES = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff'}
FIELDS = ['model', 'images', 'layer', 'map', 'state', 'features', 'images_defined', 'rho', 'low', 'high', 'inner_rho',
          'inner_low', 'inner_high', 'dilation_min', 'dilation_mean', 'dilation_max']



class Maps(NamedTuple):
    """Of one layer and image: dilation (G, H', W'), powers (G, H', W') by FEATURES, and dilations of random AdaDRs."""
    dilation: np.ndarray
    powers: dict[str, np.ndarray]
    random: list[np.ndarray]


def inner(values: np.ndarray) -> np.ndarray:
    return values[:, 1:-1, 1:-1]


@torch.no_grad()
def random_readouts(call: LayerCall, draws: int) -> list[Tensor]:
    """Dilations (B, G, H', W') of the call's AdaDR with random weights of the same scale, the bias as at the start."""
    layer = call.layer
    pad = layer.inner_padding if layer.pads_itself else 0
    x = nn.functional.pad(call.selected, [pad] * 4, mode='replicate')
    module = copy.deepcopy(layer.ada_dr)
    assert module is not None
    module.reset_parameters()
    weight, out = module.conv.weight, []
    for seed in range(draws):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        weight.div_(weight[0].numel() ** 0.5)
        out.append(module(x)[0])
    return out


@torch.no_grad()
def maps_of(model: nn.Module, x: Tensor, draws: int = 0) -> dict[str, Maps]:
    """The maps of each layer with AdaDR for an image (1, 3, H, W)."""
    out: dict[str, Maps] = {}

    def keep(call: LayerCall) -> None:
        if call.dilation is None:
            return
        groups, height, width = call.dilation.shape[1:]
        powers = {
            name: power_at_outputs(high_frequency_power(features, groups=groups), call.layer, height, width)
            for name, features in (('selected', call.selected), ('input', call.x))}
        out[call.name] = Maps(
            call.dilation[0].numpy(), {name: p[0].numpy() for name, p in powers.items()},
            [d[0].numpy() for d in random_readouts(call, draws)])

    with watch_layers(model, keep):
        model(x)
    return out


def columns(defined: int, *estimates: tuple[float, float, float]) -> dict[str, str]:
    """A row's columns of estimates (rho, low, high) over all positions, and over the inner ones."""
    out = {'images_defined': str(defined)}
    for prefix, values in zip(('', 'inner_'), estimates):
        out.update({f'{prefix}{key}': 'undefined' if np.isnan(v) else f'{v:.3f}'
                    for key, v in zip(('rho', 'low', 'high'), values)})
    return out


def correlate(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(images, 2): correlations over all positions, and over the inner ones."""
    return np.array([(spearman(a, b), spearman(inner(a), inner(b))) for a, b in pairs])


def measure(states: dict[str, nn.Module], images: Iterable[Tensor], draws: int,
            resamples: int) -> tuple[list[dict[str, str]], dict[str, list[Maps]]]:
    """The rows of the table, and the trained model's maps by layer.

    Args:
        states: Models in eval mode by state; 'trained' has the random readouts beside it.
        images: Inputs (1, 3, H, W).
        draws: Number of random readouts.
        resamples: Of the bootstrap.
    """
    found: dict[str, dict[str, list[Maps]]] = {state: {} for state in states}
    for x in images:
        for state, model in states.items():
            for layer, maps in maps_of(model, x, draws if state == 'trained' else 0).items():
                found[state].setdefault(layer, []).append(maps)
    rows = []
    for layer in found['trained']:
        for state, by_layer in found.items():
            all_maps = by_layer[layer]
            dilations = np.concatenate([m.dilation.ravel() for m in all_maps])
            described = {f'dilation_{k}': f'{v:.3f}' for k, v in (
                ('min', dilations.min()), ('mean', dilations.mean()), ('max', dilations.max()))}
            head = {'layer': layer, 'map': 'x'.join(map(str, all_maps[0].dilation.shape[1:])), 'state': state}
            for name in FEATURES:
                c = correlate([(m.dilation, m.powers[name]) for m in all_maps])
                rows.append({**head, 'features': name, **described, **columns(
                    int((~np.isnan(c[:, 0])).sum()), bootstrap(c[:, 0], resamples), bootstrap(c[:, 1], resamples))})
        if draws:
            of_images = found['trained'][layer]
            c = np.stack([correlate([(m.random[i], m.powers['selected']) for m in of_images]) for i in range(draws)])
            rows.append({**head, 'state': 'random', 'features': 'selected', **columns(
                int((~np.isnan(c[..., 0])).any(0).sum()), over_draws(c[..., 0]), over_draws(c[..., 1]))})
    return rows, found['trained']


def draw(maps: dict[str, list[Maps]], rows: Sequence[dict[str, str]], title: str, bins: int = 10) -> 'Figure':
    """A panel per layer: each image's positions in tenths by power, their mean dilation minus the image's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    across = min(3, len(maps))
    lines = -(-len(maps) // across)
    fig = Figure((12.5, 1.0 + 3.5 * lines), dpi=128, facecolor='white',
                 layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(fig)
    fig.suptitle(title, fontsize=13, fontweight='bold')
    axes = fig.subplots(lines, across, squeeze=False).ravel()
    for ax in axes[len(maps):]:
        ax.set_axis_off()
    for ax, (layer, of_images) in zip(axes, maps.items()):
        curves = []
        for m in of_images:
            power, dilation = m.powers['selected'].ravel(), m.dilation.ravel() - m.dilation.mean()
            n = min(bins, len(power))
            curves.append([part.mean() for part in np.array_split(dilation[np.argsort(power, kind='stable')], n)])
        low, middle, high = np.percentile(curves, (25, 50, 75), axis=0)
        tenths = (np.arange(len(middle)) + 0.5) * 100 / len(middle)
        ax.fill_between(tenths, low, high, color='#2b6ca3', alpha=0.22, linewidth=0, label='middle half of the images')
        ax.plot(tenths, middle, color='#2b6ca3', marker='o', markersize=4, label='median image')
        ax.axhline(0, color='#bbbbbb', linewidth=0.9, zorder=0)
        head = layer
        for state, text in (('trained', 'ρ = {rho} [{low}, {high}]'), ('random', 'random readouts {low} to {high}')):
            for row in [r for r in rows if r['layer'] == layer and r['state'] == state][:1]:  # of FEATURES the first
                head += '\n' + ('ρ undefined' if row['rho'] == 'undefined' else text.format(**row))
        ax.set_title(head, fontsize=11)
        ax.set_xlabel('rank of the high-frequency power, %', fontsize=10.5)
        ax.set_ylabel("dilation minus the image's mean, px", fontsize=10.5)
        ax.set_xlim(0, 100)
        ax.tick_params(labelsize=10)
        ax.spines[['top', 'right']].set_visible(False)
    axes[0].legend(fontsize=9.5, frameon=False)
    return fig


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and the images of the folders, sorted."""
    out: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(f'There are no images in {path} (of {", ".join(sorted(SUFFIXES))}).')
            out += inside
        elif path.is_file():
            out.append(path)
        else:
            raise FileNotFoundError(f'There is no image or folder {path}.')
    return out


def read_images(files: Sequence[Path], model: nn.Module, size: int | None) -> Iterable[Tensor]:
    """Whole images, the long side to `size` (default: that of the model's inputs), sides to a multiple of 32."""
    config = resolve_data_config(model=model)
    long_side = size or max(config['input_size'][1:])
    for file in files:
        try:
            pixels = read_image(file)
        except ValueError as e:
            raise ValueError(f'{file}: {e}') from e
        width, height = (max(32, round(s * long_side / max(pixels.size) / 32) * 32) for s in pixels.size)
        crop_args = {'input_size': (3, height, width), 'crop_pct': 1.0, 'crop_mode': 'center'}
        transform = create_transform(**resolve_data_config(crop_args, model=model))
        yield transform(pixels)[None]


def tile_images(count: int, model: nn.Module, size: int | None, data: Path) -> Iterable[Tensor]:
    """Held-out Blue Marble tiles, evenly from their list (which is sorted by place)."""
    rgb, zones, _ = load_rasters(data)
    _, tiles, _ = split_tiles(zones)
    config = resolve_data_config(model=model)
    image, size = Image.fromarray(rgb), size or config['input_size'][1]
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ('mean', 'std'))
    for i in np.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().astype(int):
        pixels = np.asarray(crop(image, tiles.centres[i], TILE * CELL, size))
        yield (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - mean) / std


def states_of(name: str | None, checkpoint: Path | None) -> tuple[str, dict[str, nn.Module]]:
    """The architecture's name, and the model trained and as it starts, in eval mode.

    Args:
        name: Of an FADC model; None for the default, or for the one in the folder.
        checkpoint: A file of weights, FADC or plain, or the folder of a model; None for those of the name.

    Raises:
        ValueError: The folder holds another architecture, or none.
    """
    if checkpoint is not None and checkpoint.is_dir():
        trained = load_checkpoint(checkpoint, name)
        initial = copy.deepcopy(trained)
        torch.manual_seed(0)
        for m in initial.modules():
            reset = getattr(m, 'reset_parameters', None)
            if callable(reset):
                reset()
        return architecture_name(trained), {'trained': trained, 'initial': initial}
    name = name or DEFAULT_MODEL
    trained = timm.create_model(name, pretrained=True) if checkpoint is None else load_checkpoint(checkpoint, name)
    torch.manual_seed(0)
    return name, {'trained': trained.eval(), 'initial': timm.create_model(name).eval()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', metavar='NAME', help=f'FADC model ({DEFAULT_MODEL})')
    parser.add_argument('--checkpoint', type=Path, metavar='PATH',
                        help='trained weights, or the folder of a model; default: the pretrained weights')
    parser.add_argument('--images', type=Path, nargs='+', metavar='PATH',
                        help='images, or folders of images; default: held-out Blue Marble tiles')
    parser.add_argument('--tiles', type=int, default=120, metavar='N', help='number of tiles (%(default)s)')
    parser.add_argument('--data', type=Path, default=CACHE_DIR, help='cache folder of the Blue Marble')
    parser.add_argument('--size', type=int, metavar='PX', help="long side of the input; default: the model's")
    parser.add_argument('--draws', type=int, default=20, metavar='N', help='random readouts (%(default)s)')
    parser.add_argument('--resamples', type=int, default=2000, metavar='N', help='of the bootstrap (%(default)s)')
    parser.add_argument('--output', type=Path, default=OUTPUT, metavar='CSV', help='%(default)s; the plot beside it')
    args = parser.parse_args(argv)
    for name, least in (('tiles', 2), ('draws', 0), ('resamples', 1), ('size', 32)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f'--{name} must be at least {least}, got {getattr(args, name)}')
    try:
        files = image_files(args.images) if args.images else []  # before a download
        name, states = states_of(args.model, args.checkpoint)
        model = states['trained']
        if args.images:
            images, what = read_images(files, model, args.size), f'{len(files)} images'
        else:
            images, what = tile_images(args.tiles, model, args.size, args.data), f'{args.tiles} Blue Marble tiles'
        rows, maps = measure(states, images, args.draws, args.resamples)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'dilation_frequency: {e}', file=sys.stderr)
        return 2
    source = f'{name} ({args.checkpoint.name})' if args.checkpoint else name
    write_csv(args.output, FIELDS, ({'model': source, 'images': what, **row} for row in rows))
    fig = draw(maps, rows, f'{source}: dilation by high-frequency power, {what}')
    plot = save(fig, args.output.with_suffix('.png'))
    for row in rows:
        interval = '' if row['rho'] == 'undefined' else f' [{row["low"]}, {row["high"]}]'
        inside = '' if row['inner_rho'] == 'undefined' else f', without the border {row["inner_rho"]}'
        print(f'{row["layer"]} {row["map"]} {row["state"]}, {row["features"]}: {row["rho"]}{interval}{inside}')
    print(f'wrote {args.output} and {plot}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
