"""The command line: `fadc-timm visualize | list | convert | info | run`, also as `python -m fadc_timm`."""
import argparse
import os
import sys
from typing import List, Optional

from . import convert, info, listing, run, visualize
from ._common import CommandError

__all__ = ['main']

# Each adds its parser, which knows the function that does the work.
_COMMANDS = (visualize, listing, convert, info, run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='fadc-timm', description='timm backbones with Frequency-Adaptive Dilated Convolution')
    commands = parser.add_subparsers(dest='command', required=True, metavar='visualize | list | convert | info | run')
    for command in _COMMANDS:
        command.add_parser(commands)
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
            return run.run(argv[1], argv[2:])
        args = parser.parse_args(argv)
        return args.run(args)
    except CommandError as e:
        print(f'fadc-timm: error: {e}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fadc-timm list | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
