"""`fadc-timm push`: the folder of a model goes to the Hub, with a card."""
import argparse
import json
from pathlib import Path
from typing import Any, Optional

from .._writing import write_atomically
from ._common import CommandError, first_line

__all__ = ['add_parser']

_PUSH = '''Publish the folder of a model on the Hub, with a model card, in one commit.

    fadc-timm push tuned OWNER/NAME --license apache-2.0 --dataset OWNER/DATA --about about.md --dry-run
    fadc-timm push tuned OWNER/NAME

FOLDER is what fadc_timm.save or `fadc-timm convert` wrote. The command loads it, writes README.md into it where there
is none (you may edit it before you push), and sends the three files. A card that the repository already has stays,
unless --update-card is given. With --dry-run nothing is sent. The token is that of `hf auth login`, or HF_TOKEN.

Exit status: 0, or 2 where the folder cannot be published; then nothing was sent.'''


def _licence(folder: Path, given: Optional[str]) -> str:
    """The licence for the card: that of config.json, or the one that is given where config.json has none."""
    stated = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('pretrained_cfg', {}).get('license')
    if stated and given and stated != given:
        raise CommandError(
            f"--license {given}: {folder / 'config.json'} says {stated}, the licence of the weights that the model was "
            f"made of. If it was made of others, save it with pretrained_cfg=dict(license='{given}')")
    if not (stated or given):
        raise CommandError(f'{folder} says no licence: give --license, for instance apache-2.0')
    return stated or given or ''


def _write_card(args: argparse.Namespace) -> str:
    """Write the card where there is none; a line on what was done."""
    from ..hub import folder_card
    path = args.folder / 'README.md'
    named = [f'--{name}' for name in ('about', 'base-model', 'dataset', 'license')
             if getattr(args, name.replace('-', '_'))]
    if path.exists() and not args.new_card:
        if named:
            raise CommandError(
                f'{path} is there already, and {", ".join(named)} would change nothing: --new-card writes it anew')
        return f'{path}: as it was'
    licence = _licence(args.folder, args.license)
    text = folder_card(
        args.folder, args.repository, licence=licence, datasets=args.dataset or (), base_model=args.base_model,
        about=args.about.read_text(encoding='utf-8') if args.about else '')
    write_atomically(path, lambda part: part.write_text(text, encoding='utf-8'))
    return f'{path}: written'


def _push(args: argparse.Namespace) -> int:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from ..checkpoints import load
    from ..hub import Refused, push_folder, uploads
    from ..models._download import file_sha256
    try:
        validate_repo_id(args.repository)
        if args.repository.count('/') != 1:
            raise CommandError(f"the repository is OWNER/NAME, got '{args.repository}'")
        load(args.folder)
        print(_write_card(args))
        for path in uploads(args.folder):
            print(f'  {path.name}: {path.stat().st_size} bytes, sha256 {file_sha256(path)}')
        if args.dry_run:
            print(f'nothing was sent to {args.repository}: with --dry-run')
            return 0
        pushed = push_folder(
            args.folder, args.repository, update_card=args.update_card, private=True if args.private else None)
    except (HFValidationError, OSError, Refused, RuntimeError, TypeError, ValueError) as e:  # HTTP errors are OSErrors
        raise CommandError(f'push: {first_line(e)}') from e
    print(f'pushed {", ".join(pushed.uploaded)}: {pushed.url}')
    if 'README.md' not in pushed.uploaded:
        print('the card that was there stays; --update-card replaces it')
    if pushed.other:
        print(f'the repository also has: {", ".join(pushed.other)}')
    print(f"fadc_timm.load('hf-hub:{args.repository}')")
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'push', help='publish the folder of a model on the Hub, with a card',
        formatter_class=argparse.RawDescriptionHelpFormatter, description=_PUSH)
    p.add_argument('folder', type=Path, metavar='FOLDER', help='what fadc_timm.save or `fadc-timm convert` wrote')
    p.add_argument('repository', metavar='OWNER/NAME', help='repository on the Hub, made where it is not there')
    p.add_argument('--dry-run', action='store_true', help='write the card, and send nothing')
    p.add_argument('--private', action='store_true', help='a new repository is private')
    p.add_argument('--update-card', action='store_true', help='replace a card that the repository already has')
    card = p.add_argument_group('the card')
    card.add_argument('--license', metavar='NAME', help='licence of the weights, by its name on the Hub')
    card.add_argument('--dataset', action='append', metavar='NAME', help='what it was trained on; may be given again')
    card.add_argument('--base-model', metavar='OWNER/NAME', help='repository of the weights that it was made of')
    card.add_argument('--about', type=Path, metavar='FILE', help='Markdown on how it was trained and what it gets')
    card.add_argument('--new-card', action='store_true', help='write README.md anew where FOLDER has one')
    p.set_defaults(run=_push)
