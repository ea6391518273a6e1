"""Gradients whose own derivative is wanted: those of a formula in torch's own operators, in place of a kernel's."""
from typing import Callable, List, Optional, Sequence

import torch
from torch import Tensor

from .runtime import is_transformed, without_autocast

__all__ = ['formula_gradients', 'once', 'refuse_more', 'wants_formula']


def wants_formula(grad: Tensor) -> bool:
    """Within a backward pass: whether its result is to be differentiated (`create_graph=True`), or is one of many.

    Args:
        grad: The gradient that came in; `is_grads_batched=True` makes it one of many.
    """
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def formula_gradients(
        formula: Callable[..., Tensor], tensors: Sequence[Optional[Tensor]], grad: Tensor) -> List[Optional[Tensor]]:
    """Gradients of a formula, themselves differentiable where the backward pass is.

    Args:
        formula: What an operator computes, from the same tensors.
        tensors: Those that the operator took.
        grad: The gradient of its result.

    Returns:
        For each tensor its gradient, or None where it needs none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(grad):
        # Aliases, because one tensor may have been computed from another, whose gradient must not contain it.
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        if not wanted:
            return [None for _ in tensors]
        found = torch.autograd.grad(formula(*aliases), wanted, grad, create_graph=create_graph, allow_unused=True)
    grads = iter(found)
    return [next(grads) if t is not None and t.requires_grad else None for t in aliases]


def refuse_more(name: str, *grads: Optional[Tensor]) -> None:
    """Within the backward pass of a backend that has only first derivatives: raise where more is wanted."""
    if any(grad is not None and wants_formula(grad) for grad in grads):
        raise NotImplementedError(
            f"The backend {name!r} has no second derivatives, and cannot take many gradients at once: choose "
            "'grid_sample' or 'reference', as by fadc_timm.ops.set_backend('grid_sample').")


def once(y: Tensor, name: str) -> Tensor:
    """The result of torch's own operator that has only first derivatives, with :func:`refuse_more` before its gradient.

    A backward pass of ours calls :func:`refuse_more` itself.
    """
    if y.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        y.register_hook(lambda grad: refuse_more(name, grad))
    return y
