"""The backends of the operator. A new one is a file with `forward` and `why_not`, and a line here."""
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from torch import Tensor

from . import _gather, _grid_sample, _torchvision, _triton, reference
from .case import Case
from .low_pass import is_exporting

__all__ = [
    'BACKENDS', 'Backend', 'check_name', 'choose_backend', 'list_backends', 'named_backend', 'set_backend']

_VARIABLE = 'FADC_TIMM_BACKEND'


class Backend(NamedTuple):
    """forward computes a case; why_not names the reason why it cannot, or returns None."""
    forward: Callable[[Case], Tensor]
    why_not: Callable[[Case], Optional[str]]


BACKENDS: Dict[str, Backend] = {
    'reference': Backend(reference.forward, reference.why_not),
    'gather': Backend(_gather.forward, _gather.why_not),
    'torchvision': Backend(_torchvision.forward, _torchvision.why_not),
    'grid_sample': Backend(_grid_sample.forward, _grid_sample.why_not),
    'triton': Backend(_triton.forward, _triton.why_not),
}


def list_backends() -> List[str]:
    """Names of the backends, whether or not they can run on this machine."""
    return list(BACKENDS)


def check_name(name: Any) -> str:
    """A backend's name, if it is one.

    Raises:
        ValueError: There is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f'There is no backend {name!r}, the backends are {", ".join(BACKENDS)}.')
    return name


# what set_backend was given last
_override: Optional[str] = None


class set_backend:
    """Choose the backend for all calls that name none, from now on, or in a `with` block until its end.

    It comes before the choice by device, and before that of the environment variable FADC_TIMM_BACKEND, which is read
    at every call. As with every named backend, a case that it cannot run raises, and does not fall back. The setting is
    the process's, for all of its threads. 'triton' goes for FreqSelect's band mix too.
    """

    def __init__(self, name: Optional[str]) -> None:
        """
        Args:
            name: A name of :func:`list_backends`, or None to leave the choice to the environment and the device again.

        Raises:
            ValueError: There is no such backend.
        """
        global _override
        self.previous = _override
        _override = None if name is None else check_name(name)

    def __enter__(self) -> 'set_backend':
        return self

    def __exit__(self, *args: Any) -> None:
        global _override
        _override = self.previous


def named_backend() -> Optional[str]:
    """The backend that :class:`set_backend` or else FADC_TIMM_BACKEND asks for, or None.

    Raises:
        ValueError: The environment variable names no backend.
    """
    if _override is not None:
        return _override
    name = os.environ.get(_VARIABLE)
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f'The environment variable {_VARIABLE} is {name!r}, it must be one of {", ".join(BACKENDS)}.')
    return name


def choose_backend(case: Case) -> str:
    """The backend that `backend=None` takes where none is set: by device, dtype and shape only, so that tracing can
    follow it."""
    device = case.x.device.type
    if is_exporting():
        return 'grid_sample'  # in operators that every runtime has
    if device in ('cpu', 'meta'):
        return 'gather'
    if device == 'cuda':
        return 'gather' if case.is_depthwise else 'torchvision'
    return 'grid_sample'
