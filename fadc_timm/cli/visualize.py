"""`fadc-timm visualize`: dilation maps or taps, and band weights, for images, or power spectra: tables and pictures."""
import argparse
import difflib
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from ._common import CommandError, check_model_name, first_line

__all__ = ['add_parser']

_DEFAULT_MODEL = 'test_resnet_fadc'
_PHOTOGRAPH = Path(__file__).parents[1] / 'data' / 'coffee.jpg'
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


def _load_folder(folder: str, name: Optional[str]) -> Tuple[nn.Module, str]:
    """The FADC model in a folder, and the name of its architecture, which is that of `name` if there is one."""
    from ..checkpoints import load_checkpoint
    from ..models._family import architecture_name, fadc_keys
    try:
        model = load_checkpoint(folder, name)
    except Exception as e:  # the folder can hold anything
        raise CommandError(f"cannot load the model in '{folder}': {first_line(e)}") from e
    own = architecture_name(model)
    if not fadc_keys(model):
        raise CommandError(f"the model {own} in '{folder}' has no FADC layers; `fadc-timm convert` adds them")
    return model, own


class _Subject(NamedTuple):
    """The model to draw, in eval mode.

    name: As in the headline.
    weights: Where they come from.
    hint: The option that gives weights which were trained with FADC, if these were not.
    """
    model: nn.Module
    name: str
    weights: str
    hint: str


def _build_model(args: argparse.Namespace) -> _Subject:
    """The model that `visualize` was asked for."""
    if args.checkpoint and args.pretrained:
        raise CommandError('--pretrained and --checkpoint exclude each other')
    if args.checkpoint and os.path.isdir(args.checkpoint):
        model, name = _load_folder(args.checkpoint, args.model)
        return _Subject(model, name, f'weights from {args.checkpoint}', '--checkpoint')
    name = args.model or _DEFAULT_MODEL
    check_model_name(name)
    if args.checkpoint:
        return _Subject(
            _load_checkpoint(name, args.checkpoint).eval(), name, f'weights from {args.checkpoint}', '--checkpoint')
    cfg = get_pretrained_cfg(name)
    local = bool(cfg and cfg.file)
    pretrained = local or '.' in name if args.pretrained is None else args.pretrained
    if not pretrained:
        model = timm.create_model(name).eval()
        return _Subject(model, name, 'random weights', '--pretrained' if local else '--checkpoint')
    source = 'in the package' if local else cfg and (cfg.hf_hub_id or cfg.url)
    if not source:
        raise CommandError(f"'{name}' has no pretrained weights; give --no-pretrained or --checkpoint")
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as e:  # network, cache and format errors come in many types
        raise CommandError(f"cannot load the weights of '{name}' ({source}): {first_line(e)}") from e
    return _Subject(model, name, f"pretrained weights '{cfg.tag if cfg else ''}', {source}", '--checkpoint')


def _read_image(path: Path) -> Any:
    from PIL import Image

    from ..visualize import read_image
    try:
        return read_image(path)
    except FileNotFoundError as e:
        raise CommandError(f"no image at '{path}'") from e
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise CommandError(f"cannot read '{path}' as an image: {first_line(e)}") from e


def _pictures(images: List[Path], out: Optional[str]) -> List[Path]:
    """The PNG for each image: --out for one image, or in the folder --out for several."""
    several = len(images) > 1
    path = Path(out or ('fadc_visualize' if several else 'fadc_visualize.png'))
    if not path.parent.is_dir():
        raise CommandError(f"no folder '{path.parent}' to write '{path.name}' to")
    if not several:
        if path.suffix.lower() != '.png':
            raise CommandError(f"--out wants a name that ends in .png, got '{out}'")
        if path.is_dir():
            raise CommandError(f"'{path}' is a folder")
        return [path]
    if path.suffix.lower() == '.png' or (path.exists() and not path.is_dir()):
        raise CommandError(f"--out wants a folder for the pictures of {len(images)} images, got '{path}'")
    pictures: Dict[Path, Path] = {}
    for image in images:
        first = pictures.setdefault(path / f'{image.stem}.png', image)
        if first is not image:
            raise CommandError(f"'{first}' and '{image}' have the same name, so their pictures would too")
    return list(pictures)


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


def _seen(model: nn.Module, image: Any, size: Tuple[int, int]) -> Tuple[torch.Tensor, Any]:
    """The model's input (1, 3, H, W) for an image, and its pixels (H, W, 3) in [0, 1], crop included."""
    from timm.data import create_transform, resolve_data_config
    crop = {'input_size': (3, *size), 'crop_pct': 1.0, 'crop_mode': 'center'}
    config = resolve_data_config(crop, model=model)
    x = create_transform(**config)(image)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return x[None], (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _draw(subject: _Subject, image: Any, size: Tuple[int, int], args: argparse.Namespace) -> Tuple[str, Any]:
    """The text and the figure of an image."""
    from .. import visualize
    x, seen = _seen(subject.model, image, size)
    if args.spectrum:
        spectra = visualize.collect_spectra(subject.model, x)
        chosen = _choose_layers(spectra, args.layer) if args.layer else visualize.first_of_stages(spectra)
        text, untrained = visualize.spectrum_table(spectra), visualize.all_unchanged(spectra)
    else:
        stages = visualize.summarize(visualize.collect(subject.model, x))
        text, untrained = visualize.table(stages), visualize.all_at_start(stages)
    note = f'{subject.weights[0].upper()}{subject.weights[1:]}.'
    if untrained:
        what = 'No spectrum changes' if args.spectrum else 'No map differs from its start'
        line = f'{what}, as before any training of FADC; {subject.hint} takes weights that were trained with it.'
        text, note = f'{text}\n{line}', f'{note} {line}'
    if args.spectrum:
        return text, visualize.spectrum_figure(chosen, f'{subject.name}: power spectra', note)
    return text, visualize.figure(seen, stages, subject.name, note)


def _visualize(args: argparse.Namespace) -> int:
    if args.layer and not args.spectrum:
        raise CommandError('--layer is for --spectrum: dilation maps are those of whole stages')
    images = [Path(path) for path in args.image] or [_PHOTOGRAPH]
    pictures = _pictures(images, args.out)
    # all of them once before the model is built, and not all at once in memory
    sizes = [_input_size(_read_image(path).size, args.size) for path in images]
    subject = _build_model(args)
    cfg: Dict[str, Any] = subject.model.pretrained_cfg  # type: ignore[assignment]  # a dictionary, not a module
    if cfg['input_size'][0] != 3:
        raise CommandError(f"the model takes images of {cfg['input_size'][0]} channels; visualize is for those of 3")

    from .. import visualize
    for path, size, out in zip(images, sizes, pictures):
        text, fig = _draw(subject, _read_image(path), size, args)
        named = f'{path}: ' if len(images) > 1 else ''
        print(f'{named}{subject.name}: {subject.weights}; input {size[1]}x{size[0]}')
        print(text)
        try:
            if len(images) > 1:
                out.parent.mkdir(exist_ok=True)
            visualize.save(fig, out)
        except OSError as e:
            raise CommandError(f"cannot write '{out}': {first_line(e)}") from e
        print(f'wrote {out}')
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'visualize', help='dilation maps or taps, and band weights, for images, or spectra, as a table and a PNG',
        description='Draw the dilation maps and FreqSelect band weights that a model chooses for an image; or power '
                    'spectra of features before and after FreqSelect, and of kernels before and after AdaKern.')
    p.add_argument('image', nargs='*', metavar='IMAGE', help='image files; default: the photograph in the package')
    p.add_argument('--model', metavar='NAME', help=f'FADC model, tag optional ({_DEFAULT_MODEL})')
    p.add_argument('--pretrained', action=argparse.BooleanOptionalAction,
                   help='default: on where the name has a tag or the weights are in the package, so that nothing is '
                        'fetched unasked')
    p.add_argument('--checkpoint', metavar='PATH',
                   help='weights of an FADC model, or of its plain base; or the folder of a model, which names it')
    p.add_argument('--spectrum', action='store_true', help='power spectra instead of dilation maps')
    p.add_argument('--layer', action='append', metavar='NAME',
                   help='with --spectrum: a layer to draw, may be given again; default: the first of each stage')
    p.add_argument('--out', metavar='PATH',
                   help='picture to write (fadc_visualize.png); of several images, the folder for their pictures '
                        '(fadc_visualize)')
    p.add_argument('--size', metavar='N',
                   help=f'long side of the input; default: {_DEFAULT_LONG_SIDE}, both sides to a multiple of 32')
    p.set_defaults(run=_visualize)
