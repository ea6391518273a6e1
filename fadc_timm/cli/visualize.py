"""`fadc-timm visualize`: dilation maps and band weights for an image, or power spectra, as a table and a picture."""
import argparse
import difflib
import os
from pathlib import Path
from typing import Any, List, Optional, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from ._common import CommandError, check_model_name, first_line

__all__ = ['add_parser']

_DEFAULT_MODEL = 'test_resnet_fadc'
_DEFAULT_LONG_SIDE = 576  # gives a map 18 cells wide at stride 32, and takes one or two seconds on a CPU


def _load_checkpoint(name: str, path: str) -> nn.Module:
    """An FADC model with the weights of a file (of the model or its plain base), with as many classes as the file."""
    from ..checkpoints.convert import convert, read_checkpoint
    if not os.path.isfile(path):
        raise CommandError(f"no checkpoint at '{path}'")
    try:
        checkpoint = read_checkpoint(Path(path))
    except (OSError, RuntimeError) as e:
        raise CommandError(f"cannot read checkpoint '{path}': {first_line(e)}") from e
    try:
        return convert(checkpoint, name).model
    except Exception as e:  # a filter function can raise anything, depending on what the file holds
        problem = ' '.join(str(e).split())
        problem = problem if len(problem) <= 300 else problem[:297] + '...'
        raise CommandError(f"checkpoint '{path}' does not fit '{name}': {problem}") from e


def _build_model(args: argparse.Namespace) -> Tuple[nn.Module, str]:
    """The model that `visualize` was asked for, in eval mode, and a line on where its weights come from."""
    check_model_name(args.model)
    if args.checkpoint and args.pretrained:
        raise CommandError('--pretrained and --checkpoint exclude each other')
    if args.checkpoint:
        return _load_checkpoint(args.model, args.checkpoint).eval(), f'weights from {args.checkpoint}'
    cfg = get_pretrained_cfg(args.model)
    local = bool(cfg and cfg.file)
    pretrained = local if args.pretrained is None else args.pretrained
    if not pretrained:
        return timm.create_model(args.model).eval(), 'random weights; the FADC layers are at their identity start'
    source = 'in the package' if local else cfg and (cfg.hf_hub_id or cfg.url)
    if not source:
        raise CommandError(f"'{args.model}' has no pretrained weights; give --no-pretrained or --checkpoint")
    try:
        model = timm.create_model(args.model, pretrained=True).eval()
    except Exception as e:  # network, cache and format errors come in many types
        raise CommandError(f"cannot load the weights of '{args.model}' ({source}): {first_line(e)}") from e
    return model, f"pretrained weights '{cfg.tag if cfg else ''}', {source}"


def _read_image(path: Optional[str]) -> Any:
    from PIL import Image, ImageOps
    path = path or str(Path(__file__).parents[1] / 'data' / 'coffee.jpg')
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except FileNotFoundError as e:
        raise CommandError(f"no image at '{path}'") from e
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise CommandError(f"cannot read '{path}' as an image: {first_line(e)}") from e


def _input_size(image_size: Tuple[int, int], size: Optional[str]) -> Tuple[int, int]:
    """(H, W) of the input: the image's aspect ratio, sides rounded to multiples of 32 unless --size is given."""
    if size is not None and not (size.isdecimal() and int(size) >= 32):
        raise CommandError(f"--size wants a whole number of pixels, 32 or more, got '{size}'")
    unit, long_side = (1, int(size)) if size else (32, _DEFAULT_LONG_SIDE)
    width, height = (max(32, round(side * long_side / max(image_size) / unit) * unit) for side in image_size)
    return height, width


def _choose_layers(spectra: List[Any], names: List[str]) -> List[Any]:
    """The spectra of the layers that were asked for, in that order."""
    found = {s.name: s for s in spectra}
    for name in names:
        if name not in found:
            close = difflib.get_close_matches(name, found, n=3)
            raise CommandError(f"no FADC layer is called '{name}'; {'close matches' if close else 'the layers'}: "
                               f"{', '.join(close or found)}")
    return [found[name] for name in names]


def _visualize(args: argparse.Namespace) -> int:
    if args.layer and not args.spectrum:
        raise CommandError('--layer is for --spectrum: dilation maps are those of whole stages')
    out = Path(args.out)
    if out.suffix.lower() != '.png':
        raise CommandError(f"--out wants a name that ends in .png, got '{args.out}'")
    if out.is_dir():
        raise CommandError(f"'{args.out}' is a folder")
    if not out.parent.is_dir():
        raise CommandError(f"no folder '{out.parent}' to write '{out.name}' to")
    image = _read_image(args.image)
    height, width = _input_size(image.size, args.size)
    model, weights = _build_model(args)

    from timm.data import create_transform, resolve_data_config

    from .. import visualize
    crop = {'input_size': (3, height, width), 'crop_pct': 1.0, 'crop_mode': 'center'}
    config = resolve_data_config(crop, model=model)
    x = create_transform(**config)(image)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    seen = (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()  # the pixels that the model saw, crop included

    note = weights[0].upper() + weights[1:]
    if args.spectrum:
        spectra = visualize.collect_spectra(model, x[None])
        text = visualize.spectrum_table(spectra)
        chosen = _choose_layers(spectra, args.layer) if args.layer else visualize.first_of_stages(spectra)
        fig = visualize.spectrum_figure(chosen, f'{args.model}: power spectra', note)
    else:
        stages = visualize.summarize(visualize.collect(model, x[None]))
        text = visualize.table(stages)
        fig = visualize.figure(seen, stages, args.model, note)
    print(f'{args.model}: {weights}; input {width}x{height}')
    print(text)
    try:
        visualize.save(fig, out)
    except OSError as e:
        raise CommandError(f"cannot write '{out}': {first_line(e)}") from e
    print(f'wrote {out}')
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'visualize', help='dilation maps and band weights for an image, or spectra, as a table and a PNG',
        description='Draw the dilation maps and FreqSelect band weights that a model chooses for an image; or power '
                    'spectra of features before and after FreqSelect, and of kernels before and after AdaKern.')
    p.add_argument('image', nargs='?', metavar='IMAGE', help='any image file; default: the photograph in the package')
    p.add_argument('--model', default=_DEFAULT_MODEL, metavar='NAME', help='FADC model, tag optional (%(default)s)')
    p.add_argument('--pretrained', action=argparse.BooleanOptionalAction,
                   help='default: on where the weights are in the package, so that nothing is fetched unasked')
    p.add_argument('--checkpoint', metavar='FILE', help='weights of an FADC model, or of its plain base')
    p.add_argument('--spectrum', action='store_true', help='power spectra instead of dilation maps')
    p.add_argument('--layer', action='append', metavar='NAME',
                   help='with --spectrum: a layer to draw, may be given again; default: the first of each stage')
    p.add_argument('--out', default='fadc_visualize.png', metavar='PNG', help='picture to write (%(default)s)')
    p.add_argument('--size', metavar='N',
                   help=f'long side of the input; default: {_DEFAULT_LONG_SIDE}, both sides to a multiple of 32')
    p.set_defaults(run=_visualize)
