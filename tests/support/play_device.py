"""A device that is not there, played on the CPU: `mps`, without float64, complex numbers and sums of int64."""
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device('mps', 0)  # without a number, torch asks the device for its current one
REFUSED = (torch.float64, torch.complex64, torch.complex128)
SCATTERS = ('scatter_add', 'scatter_reduce', 'index_add', 'index_put', 'cumsum')


class PlayTensor(torch.Tensor):
    """A tensor that says that it is on the device, around one on the CPU.

    Below Python it is on the CPU, as autograd has no thread for other devices here.
    """

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device='cpu', requires_grad=False)

    def __init__(self, inner):
        self.inner = inner

    @property
    def device(self):
        return DEVICE

    def to(self, *args, **kwargs):
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == 'cpu':  # where it is already, below Python
            return torch.ops.aten._to_copy.default(self, device=device)
        return super().to(*args, **kwargs)

    def cpu(self):
        return self.to('cpu')

    def __repr__(self):
        return f'PlayTensor({self.inner})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _is_ours(device):
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    mine = [t for t in leaves if isinstance(t, PlayTensor)]
    others = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, PlayTensor)]
    device = kwargs.get('device')
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if func.namespace == 'fadc_timm' and mine:  # its body, on the device
        from torch._library.custom_ops import OPDEFS
        with _Mode():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    indexes = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # lists of numbers may
    if mine and not moves and not indexes and any(t.dim() for t in others):
        raise RuntimeError(f'{func}: tensors are on {DEVICE.type} and on the CPU.')
    stays = _is_ours(device) if device is not None else (
        isinstance(args[0], PlayTensor) if func is torch.ops.aten.copy_.default else bool(mine))
    plain_args, plain_kwargs = tree_map(lambda t: t.inner if isinstance(t, PlayTensor) else t, (args, kwargs))
    if device is not None:
        plain_kwargs['device'] = 'cpu'
    out = func(*plain_args, **plain_kwargs)
    if not stays:
        return out
    for t in tree_leaves(out):
        if isinstance(t, torch.Tensor) and t.dtype in REFUSED:
            raise TypeError(f'{func}: {DEVICE.type} has no {t.dtype}.')
    name = func._schema.name.partition('::')[2].rstrip('_')
    if name in SCATTERS and any(isinstance(t, torch.Tensor) and t.dtype == torch.int64 for t in tree_leaves(out)):
        raise TypeError(f'{func}: {DEVICE.type} has no int64 sums.')
    if name and func._schema.is_mutable and mine and isinstance(out, torch.Tensor):
        return args[0] if out is args[0].inner else kwargs.get('out', args[0])  # what it worked on
    return tree_map(lambda t: PlayTensor(t) if isinstance(t, torch.Tensor) else t, out)


class _Mode(TorchDispatchMode):
    """Sees the calls that make tensors, or move them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_ours(kwargs.get('device')) or any(isinstance(t, PlayTensor) for t in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def play_device():
    """`torch.randn(2, device=DEVICE)`, `module.to(DEVICE)` and so on work within."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` makes parameters of another class
    try:
        with _Mode():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
