"""What the commands share: the error of a request that cannot be met, and the check of a model's name."""
import difflib

import timm

from ..models._family import list_architectures

__all__ = ['CommandError', 'check_model_name', 'first_line']


class CommandError(Exception):
    """The request cannot be met; the message says why in one line."""


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), '') or type(error).__name__


def check_model_name(name: str) -> None:
    """Raise CommandError unless the name (with or without tag) is a registered FADC model."""
    arch, _, tag = name.partition('.')
    known = [a.name for a in list_architectures()]
    if arch in known:
        tags = [n.partition('.')[2] for n in timm.list_models(f'{arch}.*', include_tags=True)]
        if tag and tag not in tags:
            raise CommandError(f"'{arch}' has no tag '{tag}'; it has: {', '.join(filter(None, tags)) or 'none'}")
        return
    lifted = [a.name for a in list_architectures() if a.base == arch]
    if lifted:
        raise CommandError(f"'{name}' is a plain timm model; with FADC it is '{lifted[0]}'"
                           + ''.join(f", or '{other}'" for other in lifted[1:]))
    ours = any(arch.endswith(suffix) for suffix in {a.variant.suffix for a in list_architectures()})
    close = difflib.get_close_matches(arch if ours else f'{arch}_fadc', known, n=3)
    hint = f"close matches: {', '.join(close)}" if close else "see 'fadc-timm list'"
    raise CommandError(f"no FADC model is called '{name}'; {hint}")
