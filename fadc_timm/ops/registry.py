"""The backends of the operator. A new one is a file with `forward` and `why_not`, and a line here."""
from typing import Callable, Dict, List, NamedTuple, Optional

from torch import Tensor

from . import _gather, _grid_sample, _torchvision, reference
from .case import Case
from .low_pass import is_exporting

__all__ = ['BACKENDS', 'Backend', 'choose_backend', 'list_backends']


class Backend(NamedTuple):
    """forward computes a case; why_not names the reason why it cannot, or returns None."""
    forward: Callable[[Case], Tensor]
    why_not: Callable[[Case], Optional[str]]


BACKENDS: Dict[str, Backend] = {
    'reference': Backend(reference.forward, reference.why_not),
    'gather': Backend(_gather.forward, _gather.why_not),
    'torchvision': Backend(_torchvision.forward, _torchvision.why_not),
    'grid_sample': Backend(_grid_sample.forward, _grid_sample.why_not),
}


def list_backends() -> List[str]:
    """Names of the backends, whether or not they can run on this machine."""
    return list(BACKENDS)


def choose_backend(case: Case) -> str:
    """The backend that `backend=None` takes: by device, dtype and shape only, so that tracing can follow it."""
    device = case.x.device.type
    if is_exporting():
        return 'grid_sample'  # in operators that every runtime has
    if device in ('cpu', 'meta'):
        return 'gather'
    if device == 'cuda':
        return 'gather' if case.is_depthwise else 'torchvision'
    return 'grid_sample'
