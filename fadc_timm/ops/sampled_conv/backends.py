"""The backends of the operator. A new one is a file with `forward` and `why_not`, and a line here."""
from typing import Callable, Dict, List, NamedTuple, Optional

from torch import Tensor

from .. import settings
from ..runtime import is_exporting, is_transformed
from ..triton_support import is_default_on
from . import gather, grid_sample, reference, torchvision, triton
from .arguments import ConvArgs

__all__ = ['BACKENDS', 'Backend', 'choose_backend', 'list_backends']


class Backend(NamedTuple):
    """forward computes a call; why_not names the reason why it cannot, or returns None."""
    forward: Callable[[ConvArgs], Tensor]
    why_not: Callable[[ConvArgs], Optional[str]]


BACKENDS: Dict[str, Backend] = {
    'reference': Backend(reference.forward, reference.why_not),
    'gather': Backend(gather.forward, gather.why_not),
    'torchvision': Backend(torchvision.forward, torchvision.why_not),
    'grid_sample': Backend(grid_sample.forward, grid_sample.why_not),
    'triton': Backend(triton.forward, triton.why_not),
}
settings.add_backends(BACKENDS)


def list_backends() -> List[str]:
    """Names of the backends, whether or not they can run on this machine."""
    return list(BACKENDS)


def choose_backend(args: ConvArgs) -> str:
    """The backend that `backend=None` takes where none is set: by device, dtype and shape only, so that tracing can
    follow it."""
    device = args.x.device.type
    if is_exporting() or is_transformed():
        return 'grid_sample'  # in operators that every runtime has, and torch's every derivative of
    if device in ('cpu', 'meta'):
        return 'gather'
    if device == 'cuda':
        if is_default_on(device):
            return 'triton'
        return 'gather' if args.is_depthwise else 'torchvision'
    return 'grid_sample'
