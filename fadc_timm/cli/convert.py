"""`fadc-timm convert`: a local checkpoint becomes an FADC model, in a folder."""
import argparse
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from timm.utils import ParseKwargs

from .._writing import write_atomically
from ..models._family import list_architectures
from ._common import CommandError, check_model_name

__all__ = ['add_parser']

_CONVERT = '''Lift a local checkpoint to an FADC model, in a folder for `timm.create_model('local-dir:DIR')`.

    fadc-timm convert resnet50_a1_0-14fe96d1.pth --model resnet50_fadc.a1_in1k --out lifted
    fadc-timm convert output/train/model_best.pth.tar --model resnet50_fadc --out tuned
    fadc-timm convert upernet_r50_fadc.pth --model resnet50c_fadc --out converted
    fadc-timm convert faster_rcnn_r50_dconv_c3-c5.pth --model resnet50_dcn --model-kwargs modulated=False --out dcn

SOURCE is a checkpoint of timm's base or FADC model (.safetensors, or a pickle such as timm's train script writes, of
which the averaged weights are taken), of mmdetection, mmsegmentation or segmentation_models_pytorch with such a
backbone, or an mmsegmentation checkpoint of the authors' code. For a model with deformable convolutions it may be a
checkpoint of mmdetection or mmsegmentation with `dcn=dict(type='DCNv2')`, or of `type='DCN'`, for `modulated=False`.
The command accounts for every key: taken (with its name in the model), added (at its initial value: FADC as the
identity), or left. It prints how many, and writes all of them into a file beside the folder. A model name with a tag
says that the weights are that tag's, and its licence and labels go into config.json; without a tag only its
preprocessing does. --mean, --std, --img-size, --crop-pct, --labels and --license record what your own weights were
trained with.

Exit status: 0, or 2 where the checkpoint cannot be converted; the folder that was there is then as it was.'''


def _read_labels(path: Path) -> List[str]:
    """The names of the classes in a text file, one per line; what follows a tab, as a colour does, is none of it."""
    lines = path.read_text(encoding='utf-8-sig').splitlines()  # without a byte order mark
    labels = [line.partition('\t')[0].strip() for line in lines]
    empty = [str(i) for i, label in enumerate(labels, start=1) if not label]
    if empty:
        raise ValueError(f'empty names of classes in the lines {", ".join(empty)}')
    return labels


def _own_cfg(args: argparse.Namespace, num_classes: int, channels: int) -> Dict[str, Any]:
    """The entries of config.json that the command line gives, checked: an error names its option."""
    from ..checkpoints import check_cfg
    size = args.img_size
    given = {
        '--mean': ('mean', args.mean), '--std': ('std', args.std), '--crop-pct': ('crop_pct', args.crop_pct),
        '--license': ('license', args.license), '--labels': ('label_names', args.labels),
        '--img-size': ('input_size', (channels, size[0], size[-1]) if size else None)}
    if size is not None and len(size) > 2:
        raise CommandError(f'--img-size wants one or two numbers, got {len(size)}')
    cfg: Dict[str, Any] = {}
    for option, (name, value) in given.items():
        if value is None:
            continue
        try:
            cfg[name] = _read_labels(value) if option == '--labels' else value
            check_cfg({name: cfg[name]}, num_classes, channels)
        except (OSError, ValueError) as e:
            raise CommandError(f'{option}{f" {value}" if option == "--labels" else ""}: {e}') from e
    return cfg


def _check_model(name: str) -> None:
    """Raise CommandError where --model is no FADC model; one that a plug-in registers shows that when it is built."""
    arch = name.partition('.')[0]
    own = {a.name for a in list_architectures()}
    if arch in own or not timm.is_model(arch) or timm.model_entrypoint(arch).__module__.startswith('timm.'):
        try:
            check_model_name(name)
        except CommandError as e:
            raise CommandError(f'--model: {e}') from e


def _convert(args: argparse.Namespace) -> int:
    from ..checkpoints import convert, fixed_logits, is_model_folder, read_checkpoint, reload, write_folder
    from ..checkpoints.convert import AUTHORS, pretrained_cfg, report, summary
    keys = args.keys or args.out.parent / f'{args.out.resolve().name}.keys.txt'
    if args.out.exists() and not is_model_folder(args.out):
        raise CommandError(f'--out: {args.out} exists and is no folder of a model.')
    _check_model(args.model)
    try:
        checkpoint = read_checkpoint(args.source, use_ema=not args.no_ema)
        converted = convert(checkpoint, args.model, args.model_kwargs, args.release or 'december2024')
    except TypeError as e:  # of an argument that the model does not know
        raise CommandError(f'{"--model-kwargs" if args.model_kwargs else args.source}: {e}') from e
    except (OSError, RuntimeError, ValueError, NotImplementedError) as e:
        raise CommandError(f'{args.source}: {e}') from e
    if args.release and converted.writer != AUTHORS:
        raise CommandError(f"--release is for checkpoints of the authors' code, and {args.source} is none")
    size = tuple(converted.model.pretrained_cfg['input_size'])  # type: ignore[index]  # a dictionary, not a module
    size = (converted.model_args.get('in_chans', size[0]), *size[1:])

    def check(folder: Path) -> None:
        a, b = (fixed_logits(model, size) for model in (converted.model, reload(folder)))
        if not torch.equal(a, b):
            raise RuntimeError('loaded again, the model computes something else')

    own = _own_cfg(args, int(converted.model.num_classes), size[0])  # type: ignore[arg-type]
    cfg = {**pretrained_cfg(args.model, checkpoint, converted), **own}
    text = '\n'.join(report(checkpoint, converted)) + '\n'
    try:
        write_folder(converted.model, args.out, pretrained_cfg=cfg, model_args=converted.model_args, check=check)
        write_atomically(keys, lambda part: part.write_text(text, encoding='utf-8'))
    except OSError as e:
        raise CommandError(f'--out {args.out} or its list of keys {keys} cannot be written: {e}') from e
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        raise CommandError(f'{args.source}: {e}') from e
    print('\n'.join(summary(checkpoint, converted)))
    print(f"Wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)\nWrote {keys}: every key")
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'convert', help='lift a local checkpoint to an FADC model, in a folder',
        formatter_class=argparse.RawDescriptionHelpFormatter, description=_CONVERT)
    p.add_argument('source', type=Path, metavar='SOURCE', help='.safetensors, .pth, .pth.tar, .bin')
    p.add_argument('--model', required=True, metavar='NAME', help='a model of `fadc-timm list`, tag optional')
    p.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write')
    p.add_argument('--no-ema', action='store_true', help='the weights themselves, where there are averaged ones')
    p.add_argument('--release', choices=('april2024', 'december2024'),
                   help="of the authors' code, for their checkpoints (default: december2024)")
    p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
                   help='more arguments of the model, such as fadc_stages="(False, False, True, True)"')
    p.add_argument('--keys', type=Path, metavar='FILE', help='list of all keys to write (default: DIR.keys.txt)')
    own = p.add_argument_group('what your own weights were trained with')
    own.add_argument('--mean', type=float, nargs='+', metavar='N',
                     help='mean of the pixels of images in [0, 1], one number per channel')
    own.add_argument('--std', type=float, nargs='+', metavar='N', help='their standard deviation')
    own.add_argument('--img-size', type=int, nargs='+', metavar='N', help='side of the input, or height and width')
    own.add_argument('--crop-pct', type=float, metavar='F',
                     help='share of the image that the centre crop keeps, up to 1')
    own.add_argument('--labels', type=Path, metavar='FILE',
                     help='names of the classes in their order, one per line; classes.txt of a segmentation is one')
    own.add_argument('--license', metavar='NAME', help='licence of the weights, by its name on the Hub')
    p.set_defaults(run=_convert)
