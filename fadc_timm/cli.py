"""The command line: `fadc-timm visualize | list | convert | info | run`, also as `python -m fadc_timm`."""
import argparse
import builtins
import difflib
import fnmatch
import os
import platform
import sys
import types
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, List, Optional, Tuple

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.utils import ParseKwargs
from torch import nn

from .models.cost import model_cost

_DEFAULT_MODEL = 'test_resnet_fadc'
_DEFAULT_LONG_SIDE = 576  # gives a map 18 cells wide at stride 32, and takes one or two seconds on a CPU

_CONVERT = '''Lift a local checkpoint to an FADC model, in a folder for `timm.create_model('local-dir:DIR')`.

    fadc-timm convert resnet50_a1_0-14fe96d1.pth --model resnet50_fadc.a1_in1k --out lifted
    fadc-timm convert output/train/model_best.pth.tar --model resnet50_fadc --out tuned
    fadc-timm convert upernet_r50_fadc.pth --model resnet50c_fadc --out converted

SOURCE is a checkpoint of timm's base or FADC model (.safetensors, or a pickle such as timm's train script writes, of
which the averaged weights are taken), of mmsegmentation or segmentation_models_pytorch with such a backbone, or an
mmsegmentation checkpoint of the authors' code. The command accounts for every key: taken (with its name in the model),
added (at its initial value: FADC as the identity), or left. A model name with a tag says that the weights are that
tag's, and its licence and labels go into config.json; without a tag only its preprocessing does.

Exit status: 0, or 2 where the checkpoint cannot be converted; the folder that was there is then as it was.'''


class CommandError(Exception):
    """The request cannot be met; the message says why in one line."""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__


def _check_model_name(name: str) -> None:
    """Raise CommandError unless the name (with or without tag) is a registered FADC model."""
    arch, _, tag = name.partition('.')
    known = timm.list_models('*_fadc')
    if arch in known:
        tags = [n.partition('.')[2] for n in timm.list_models(f'{arch}.*', include_tags=True)]
        if tag and tag not in tags:
            raise CommandError(f"'{arch}' has no tag '{tag}'; it has: {', '.join(filter(None, tags)) or 'none'}")
        return
    if f'{arch}_fadc' in known:
        raise CommandError(f"'{name}' is a plain timm model; with FADC it is '{arch}_fadc'")
    close = difflib.get_close_matches(arch if arch.endswith('_fadc') else f'{arch}_fadc', known, n=3)
    hint = f"close matches: {', '.join(close)}" if close else "see 'fadc-timm list'"
    raise CommandError(f"no FADC model is called '{name}'; {hint}")


def _load_checkpoint(name: str, path: str) -> nn.Module:
    """An FADC model with the weights of a file (of the model or its plain base), with as many classes as the file."""
    from .checkpoints.convert import convert, read_checkpoint
    if not os.path.isfile(path):
        raise CommandError(f"no checkpoint at '{path}'")
    try:
        checkpoint = read_checkpoint(Path(path))
    except (OSError, RuntimeError) as e:
        raise CommandError(f"cannot read checkpoint '{path}': {_first_line(e)}") from e
    try:
        return convert(checkpoint, name).model
    except Exception as e:  # a filter function can raise anything, depending on what the file holds
        problem = ' '.join(str(e).split())
        problem = problem if len(problem) <= 300 else problem[:297] + '...'
        raise CommandError(f"checkpoint '{path}' does not fit '{name}': {problem}") from e


def _build_model(args: argparse.Namespace) -> Tuple[nn.Module, str]:
    """The model that `visualize` was asked for, in eval mode, and a line on where its weights come from."""
    _check_model_name(args.model)
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
        raise CommandError(f"cannot load the weights of '{args.model}' ({source}): {_first_line(e)}") from e
    return model, f"pretrained weights '{cfg.tag if cfg else ''}', {source}"


def _read_image(path: Optional[str]) -> Any:
    from PIL import Image, ImageOps
    path = path or str(Path(__file__).parent / 'data' / 'coffee.jpg')
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('RGB')
    except FileNotFoundError as e:
        raise CommandError(f"no image at '{path}'") from e
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        raise CommandError(f"cannot read '{path}' as an image: {_first_line(e)}") from e


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

    from . import visualize
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
        raise CommandError(f"cannot write '{out}': {_first_line(e)}") from e
    print(f'wrote {out}')
    return 0


def _list(args: argparse.Namespace) -> int:
    archs = timm.list_models('*_fadc')
    names = timm.list_models('*_fadc', include_tags=True) if args.tags else archs

    def matching(pattern: str) -> List[str]:  # what matches the architecture finds its tags too
        return [n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.partition('.')[0], pattern)]

    names = matching(args.filter) or matching(f'*{args.filter}*')
    if not names:
        close = difflib.get_close_matches(args.filter, archs, n=3, cutoff=0.5)
        hint = f"close matches: {', '.join(close)}" if close else f'there are {len(archs)} models'
        raise CommandError(f"no FADC model matches '{args.filter}'; {hint}")
    n, b = max(map(len, names)), max(4, *(len(name.partition('.')[0]) - len('_fadc') for name in names))
    print(f"{'name':{n}}  {'base':{b}}  {'params (M)':>10}  {'GMACs':>8}  {'input':>7}  weights", flush=True)
    for name in names:
        arch, cfg = name.partition('.')[0], get_pretrained_cfg(name) or PretrainedCfg()
        params, gmacs, _ = model_cost(arch, cfg.num_classes, tuple(cfg.input_size))
        weights = 'in the package' if cfg.file else cfg.hf_hub_id or '-'
        base, size = arch[:-len('_fadc')], 'x'.join(map(str, cfg.input_size[1:]))
        print(f'{name:{n}}  {base:{b}}  {params:10.2f}  {gmacs:8.2f}  {size:>7}  {weights}', flush=True)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoints import convert, fixed_logits, is_model_folder, read_checkpoint, reload, write_folder
    from .checkpoints.convert import pretrained_cfg, report
    try:
        if args.out.exists() and not is_model_folder(args.out):
            raise FileExistsError(f'{args.out} exists and is no folder of a model.')
        checkpoint = read_checkpoint(args.source, use_ema=not args.no_ema)
        if args.release and not checkpoint.official:
            raise ValueError("--release is for checkpoints of the authors' code, and this is none")
        converted = convert(checkpoint, args.model, args.model_kwargs, args.release or 'december2024')
        size = tuple(converted.model.pretrained_cfg['input_size'])  # type: ignore[index]  # a dictionary, not a module
        size = (converted.model_args.get('in_chans', size[0]), *size[1:])

        def check(folder: Path) -> None:
            a, b = (fixed_logits(model, size) for model in (converted.model, reload(folder)))
            if not torch.equal(a, b):
                raise RuntimeError('loaded again, the model computes something else')

        cfg = pretrained_cfg(args.model, checkpoint.official)
        write_folder(converted.model, args.out, pretrained_cfg=cfg, model_args=converted.model_args, check=check)
    except (OSError, RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        raise CommandError(f'{args.source}: {e}') from e
    print('\n'.join(report(checkpoint, converted)))
    print(f"Wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        return f'{gpu.name}, {gpu.total_memory / 2 ** 30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}'
    name = platform.processor() or platform.machine()
    if 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', {}):
        name += f', {os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30:.1f} GiB'
    return f'{name}, {torch.get_num_threads()} threads' if device.type == 'cpu' else name


def _info(args: argparse.Namespace) -> int:
    import torchvision

    from . import __version__
    from .ops import band_mix, choose_backend
    from .ops.sampled_conv.arguments import NO_GAINS, ConvArgs
    from .ops.sampled_conv.backends import BACKENDS
    from .ops.settings import named_backend, workspace_bytes
    from .ops.triton_support import unavailable
    why_no_triton = unavailable()
    if why_no_triton is None:
        import triton
        why_no_triton = f'triton {triton.__version__}'
    print(f'fadc_timm {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, '
          f'timm {timm.__version__}, Python {platform.python_version()}\n{why_no_triton}')
    try:
        named, megabytes = named_backend(), workspace_bytes() // 2 ** 20
    except ValueError as e:
        raise CommandError(str(e)) from e
    print(f'backend for calls that name none: {named or "by device, dtype and shape"}; '
          f"workspace of 'triton': {megabytes} MB")
    devices = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
    for device in map(torch.device, devices + ['mps'] * torch.backends.mps.is_available()):
        x = torch.zeros(1, 2, 1, 1, device=device)
        dense, depthwise = (
            ConvArgs(x, x.new_zeros(2, 2 // groups, 3, 3), x.new_ones(1, 1, 1, 1), None, None, NO_GAINS, (1, 1), (1, 1),
                     groups) for groups in (1, 2))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a default that cannot run: the reason is printed below
            chosen = named or choose_backend(dense), named or choose_backend(depthwise), band_mix.choose_backend(x)
        print(f'\n{device}: {_device_name(device)}\n'
              f'  convolution: {chosen[0]}; depthwise: {chosen[1]}; band mix: {chosen[2]}')
        for name, backend in BACKENDS.items():
            reason = backend.why_not(dense)
            print(f'  {name}: {"runs" if reason is None else f"cannot run: {reason}"}')
    return 0


def _run(script: str, args: List[str]) -> int:
    """Run a script as `python SCRIPT ARGS...` does, in this process.

    `runpy` would not do: it leaves its own frames in tracebacks, makes `__file__` relative, and removes `__main__`
    before the script's threads and exit handlers are done.
    """
    path = os.path.abspath(script)
    try:
        with open(path, 'rb') as f:
            source = f.read()
    except OSError as e:
        raise CommandError(f"run: cannot open script '{script}': {e.strerror}") from e
    sys.argv = [script, *args]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = sys.modules['__main__'] = types.ModuleType('__main__')
    module.__dict__.update(
        __file__=path, __builtins__=builtins, __cached__=None, __loader__=SourceFileLoader('__main__', path))
    try:
        exec(compile(source, path, 'exec', dont_inherit=True), module.__dict__)
    except Exception as e:
        trace = e.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # the script's own frames only
        sys.excepthook(type(e), e.with_traceback(trace), trace)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='fadc-timm', description='timm backbones with Frequency-Adaptive Dilated Convolution')
    commands = parser.add_subparsers(dest='command', required=True, metavar='visualize | list | convert | info | run')

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

    p = commands.add_parser('list', help='the models, their size and cost, and where their weights are',
                            description='List the FADC models, with the input size that the costs are for.')
    p.add_argument('filter', nargs='?', default='*', metavar='FILTER',
                   help='wildcards as in timm.list_models, or a part of the name')
    p.add_argument('--tags', action='store_true', help='a row for each pretrained tag')

    p = commands.add_parser(
        'convert', help='lift a local checkpoint to an FADC model, in a folder',
        formatter_class=argparse.RawDescriptionHelpFormatter, description=_CONVERT)
    p.add_argument('source', type=Path, metavar='SOURCE', help='.safetensors, .pth, .pth.tar, .bin')
    p.add_argument('--model', required=True, metavar='NAME', help='<arch>_fadc or <arch>_fadc.<tag>')
    p.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write')
    p.add_argument('--no-ema', action='store_true', help='the weights themselves, where there are averaged ones')
    p.add_argument('--release', choices=('april2024', 'december2024'),
                   help="of the authors' code, for their checkpoints (default: december2024)")
    p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
                   help='more arguments of the model, such as fadc_stages="(False, False, True, True)"')

    commands.add_parser(
        'info', help='versions, devices, and which backend runs where',
        description='Print versions and settings; and for each device its name and memory, the backends that are '
                    'chosen there, and why others cannot run there.')
    commands.add_parser(
        'run', usage='fadc-timm run SCRIPT ARGS...', help='run a script with the models registered',
        description='Import fadc_timm, so that timm knows its models, then run SCRIPT as `python SCRIPT ARGS...` does. '
                    'With torchrun: `torchrun --no-python fadc-timm run SCRIPT ARGS...`. Processes that the script '
                    'spawns itself have to import fadc_timm themselves.')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """The command line.

    Args:
        argv: Arguments without the program's name; None for those of this process.

    Returns:
        The exit status: 0, or 2 for a request that cannot be met (one line on stderr says why), or 1 where a script
        under `run` raised.

    Raises:
        SystemExit: From argparse for its usage errors and --help, and whatever a script under `run` exits with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    try:
        # argparse would take the script's options for its own
        if argv[:1] == ['run'] and len(argv) > 1 and argv[1] not in ('-h', '--help'):
            return _run(argv[1], argv[2:])
        args = parser.parse_args(argv)
        if args.command == 'run':
            raise CommandError('run: wants a script: fadc-timm run SCRIPT ARGS...')
        return {'visualize': _visualize, 'list': _list, 'convert': _convert, 'info': _info}[args.command](args)
    except CommandError as e:
        print(f'fadc-timm: error: {e}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fadc-timm list | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

