"""Settings of the process: the backend for calls that name none, and every environment variable of this package.

The operators read each variable at every call.

* `FADC_TIMM_BACKEND`: Name of the convolution's backend for all calls that name none; :class:`set_backend` comes first,
  and says what the name means for FreqSelect's band mix and for neighbourhood attention.
* `FADC_TIMM_WORKSPACE_MB`: Megabytes (of 2**20 bytes) that the samples of one call of the Triton backend may take at a
  time, 256 by default. Larger maps go through in tiles.

Not ours, and read by Triton when its kernels are first imported: with `TRITON_INTERPRET=1` they run on a CPU.
"""
import os
from typing import Any, Collection, List, Optional

__all__ = [
    'add_attention_backends', 'add_backends', 'check_name', 'named_backend', 'set_backend', 'workspace_bytes']

_BACKEND = 'FADC_TIMM_BACKEND'
_WORKSPACE = 'FADC_TIMM_WORKSPACE_MB'

# The names that may be set, and those of neighbourhood attention. The operators put their registries here, as settings
# import no operator.
_names: Collection[str] = ()
_attention_names: Collection[str] = ()


def add_backends(names: Collection[str]) -> None:
    """Declare the names that :class:`set_backend` takes. The collection itself is kept: names added later count."""
    global _names
    _names = names


def add_attention_backends(names: Collection[str]) -> None:
    """Declare the backends of neighbourhood attention, whose own names :class:`set_backend` refuses by a message."""
    global _attention_names
    _attention_names = names


def _of_attention(name: Any) -> str:
    """A sentence on a name that is one of neighbourhood attention, or nothing."""
    return (f' {name!r} is a backend of neighbourhood attention: neighborhood_attention2d, its layers and '
            'create_model take it as backend=.' if name in _attention_names else '')


def check_name(name: Any) -> str:
    """A backend's name, if it is one of the convolution.

    Raises:
        ValueError: There is no such backend of the convolution.
    """
    if name not in _names:
        raise ValueError(f'There is no backend {name!r} of the convolution, the backends are {", ".join(_names)}.'
                         f'{_of_attention(name)}')
    return name


# what set_backend was given last
_override: Optional[str] = None


class set_backend:
    """Choose the backend for all calls that name none, from now on, or in a `with` block until its end.

    It comes before the choice by device, and before that of the environment variable FADC_TIMM_BACKEND, which is read
    at every call, except in a compiled graph if it was unset when the graph was made. As with every named backend, a
    case that it cannot run raises, and does not fall back. The setting is the process's, for all of its threads: blocks
    of two threads have to follow each other, or to be nested.

    The names are those of the convolution. FreqSelect's band mix has Triton's kernels with 'triton', and torch's own
    operators with 'grid_sample' and 'reference'. Neighbourhood attention has a 'reference' too; with all other names it
    chooses its backend itself.
    """

    def __init__(self, name: Optional[str]) -> None:
        """
        Args:
            name: A name of :func:`list_backends`, or None to leave the choice to the environment and the device again.

        Raises:
            ValueError: There is no such backend, or it is one of neighbourhood attention alone.
        """
        self.name = None if name is None else check_name(name)
        self.previous: List[Optional[str]] = []
        self._set()
        self.is_set = True

    def _set(self) -> None:
        global _override
        self.previous.append(_override)
        _override = self.name

    def __enter__(self) -> 'set_backend':
        if not self.is_set:  # a second block
            self._set()
        self.is_set = False
        return self

    def __exit__(self, *args: Any) -> None:
        global _override
        _override = self.previous.pop()


def named_backend() -> Optional[str]:
    """The backend that :class:`set_backend` or else FADC_TIMM_BACKEND asks for, or None.

    Raises:
        ValueError: The environment variable names no backend.
    """
    if _override is not None:
        return _override
    name = os.environ.get(_BACKEND)
    if not name:
        return None
    if name not in _names:
        raise ValueError(f'The environment variable {_BACKEND} is {name!r}, it must be one of {", ".join(_names)}.'
                         f'{_of_attention(name)}')
    return name


def workspace_bytes() -> int:
    """Bytes that the samples of one call of the Triton backend may take at a time.

    Raises:
        ValueError: The environment variable is not a positive integer.
    """
    value = os.environ.get(_WORKSPACE, '256')
    if not value.isdecimal() or not int(value):
        raise ValueError(f'The environment variable {_WORKSPACE} is {value!r}, it must be a positive integer.')
    return int(value) * 2 ** 20
