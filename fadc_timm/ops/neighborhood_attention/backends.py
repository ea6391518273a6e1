"""The backends of the operator. A new one is a file with `forward` and `why_not`, and a line here."""
from typing import Callable, Dict, NamedTuple, Optional

from torch import Tensor

from .. import settings
from ..runtime import is_exporting, is_transformed
from . import flex, reference, windows, written_out
from .arguments import AttentionArgs

__all__ = ['BACKENDS', 'Backend', 'choose_backend']


class Backend(NamedTuple):
    """forward computes a call; why_not names the reason why it cannot, or returns None."""
    forward: Callable[[AttentionArgs], Tensor]
    why_not: Callable[[AttentionArgs], Optional[str]]


BACKENDS: Dict[str, Backend] = {
    'reference': Backend(reference.forward, reference.why_not),
    'windows': Backend(windows.forward, windows.why_not),
    'written_out': Backend(written_out.forward, written_out.why_not),
    'flex': Backend(flex.forward, flex.why_not),
}
settings.add_attention_backends(BACKENDS)


def choose_backend(args: AttentionArgs) -> str:
    """The backend that `backend=None` takes where 'reference' is not set.

    It is windows, except where a graph for other runtimes is made, in transforms of torch.func, and with dropout, whose
    mask the backward pass of windows would need again.
    """
    return 'written_out' if is_exporting() or is_transformed() or args.dropout_p else 'windows'
