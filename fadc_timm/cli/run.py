"""`fadc-timm run`: a script, with the models registered."""
import argparse
import builtins
import os
import sys
import types
from importlib.machinery import SourceFileLoader
from typing import Any, List

from ._common import CommandError

__all__ = ['add_parser', 'run']


def run(script: str, args: List[str]) -> int:
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


def _without_script(args: argparse.Namespace) -> int:
    raise CommandError('run: wants a script: fadc-timm run SCRIPT ARGS...')


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'run', usage='fadc-timm run SCRIPT ARGS...', help='run a script with the models registered',
        description='Import fadc_timm, so that timm knows its models, then run SCRIPT as `python SCRIPT ARGS...` does. '
                    'With torchrun: `torchrun --no-python fadc-timm run SCRIPT ARGS...`. Processes that the script '
                    'spawns itself have to import fadc_timm themselves.')
    p.set_defaults(run=_without_script)
