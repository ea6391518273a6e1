"""What the Triton kernels want to know of a call: its numbers, weights in their layout, and where gradients add up."""
import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ...runtime import accumulation_dtype
from ...triton_support import is_interpreted

__all__ = ['Bundles', 'Call', 'Scatter', 'bound', 'sampling_gradients']

_MIN_BUNDLE = 32


class Call:
    """What the kernels want to know of a call, and the arguments that all of them take."""

    def __init__(
            self,
            x: Tensor,
            dilation: Tensor,
            mask: Optional[Tensor],
            weight: Tensor,
            stride: List[int],
            padding: List[int],
            groups: int,
    ) -> None:
        self.x = x.permute(0, 2, 3, 1).contiguous()
        self.dilation, self.mask, self.weight, self.groups = dilation, mask, weight, groups
        self.b, self.h, self.w, self.c = self.x.shape
        self.o, self.per_group, self.k, _ = weight.shape[-4:]
        self.dilation_groups, self.out_h, self.out_w = dilation.shape[1:]
        self.area = self.out_h * self.out_w
        self.positions = self.b * self.area
        self.depthwise = weight.dim() == 5 or (groups > 1 and groups == self.c == self.o)
        self.dilation_width = self.c // self.dilation_groups
        r = self.k // 2
        self.geometry = (self.h, self.w, self.out_h, self.out_w, r - padding[0], r - padding[1], *stride)
        self.strides = self.x.stride()[:3], (*dilation.stride(), *(mask.stride() if mask is not None else (0,) * 4))
        self.grad_strides = (self.h * self.w * self.c, self.w * self.c)

    def tensors(self) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        return self.x, self.dilation, self.mask

    def constants(self) -> Dict[str, Any]:
        import triton.language as tl
        return {'K': self.k, 'HAS_MASK': self.mask is not None,
                'ACC': tl.float64 if self.x.dtype == torch.float64 else tl.float32}

    def products(self) -> Dict[str, Any]:
        """Constants of the kernels with matrix products."""
        return {'PRECISION': 'tf32' if _allows_tf32(self.x) else 'ieee',
                'UPCAST': self.x.dtype == torch.bfloat16 and is_interpreted()}

    def index(self, block: int) -> Any:
        import triton.language as tl
        return tl.int32 if self.positions + block < 2 ** 31 else tl.int64


def _allows_tf32(x: Tensor) -> bool:
    """As a convolution does."""
    return x.device.type == 'cuda' and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


class Bundles:
    """Groups put together until there are enough channels for a matrix product, as one block-diagonal kernel."""

    def __init__(self, call: Call) -> None:
        per_group, out_per_group = call.per_group, call.o // call.groups
        divisors = [m for m in range(1, call.groups + 1) if call.groups % m == 0]
        self.size = next((m for m in divisors if m * min(per_group, out_per_group) >= _MIN_BUNDLE), call.groups)
        self.count = call.groups // self.size
        self.shape = (self.count, self.size, out_per_group, per_group, -1)
        self.width, self.out_width = self.size * per_group, self.size * out_per_group
        self.slice_width = math.gcd(self.width, call.dilation_width)
        self.channels = (call.c, call.o, self.width, self.out_width, self.slice_width, call.dilation_width)
        self.pieces_of = call.c // self.slice_width  # and each of these in blocks

    def pack(self, weight: Tensor) -> Tensor:
        """(O, C/groups, k, k) to (bundles, k*k, C of a bundle, O of a bundle)."""
        w = weight.flatten(2).reshape(self.shape).permute(0, 4, 1, 3, 2)  # bundle, tap, group, c, o
        if self.size > 1:
            eye = torch.eye(self.size, dtype=w.dtype, device=w.device)
            w = w[:, :, :, :, None] * eye[:, None, :, None]
        return w.reshape(self.count, -1, self.width, self.out_width).contiguous()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """The transpose of pack."""
        w = packed.view(self.count, -1, self.size, self.width // self.size, self.size, self.out_width // self.size)
        return w.diagonal(dim1=2, dim2=4).permute(0, 4, 3, 2, 1).reshape(like.shape)


class Scatter:
    """Where gradients of x are added up: in float, or if torch wants that to be deterministic in whole numbers."""

    def __init__(self, call: Call, largest: Callable[[], Tensor]) -> None:
        self.fixed = torch.are_deterministic_algorithms_enabled()
        self.into = torch.zeros(
            call.x.shape, dtype=torch.int64 if self.fixed else accumulation_dtype(call.x.dtype), device=call.x.device)
        self.scale: Optional[Tensor] = None
        if self.fixed:
            # no sum over a sample's positions and taps may leave the range, whatever the dilation
            self.scale = 2. ** 62 / (largest().double().clamp(min=1e-300) * (call.area * call.k ** 2))

    def result(self) -> Tensor:
        """(B, C, H, W)."""
        into = self.into
        return (into if self.scale is None else into / self.scale).permute(0, 3, 1, 2)


def bound(grad: Tensor, kernel: Tensor, mask: Optional[Tensor], *gains: Optional[Tensor]) -> Tensor:
    """A bound of the gradients of samples: of g * kernel, added up over the output channels."""
    largest = grad.abs().amax().double() * kernel.double().abs().sum(-1).amax()
    for t in (mask, *gains):
        if t is not None:
            largest = largest * t.abs().amax()
    return largest


def sampling_gradients(call: Call, parts: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """Of dilation and mask, from those of some channels each (parts, k*k + 1, positions)."""
    total = parts.view(call.dilation_groups, -1, call.k ** 2 + 1, call.b, call.out_h, call.out_w)
    mask = None
    if call.mask is not None:
        mask = total[:, :, :-1].sum(1).permute(2, 0, 1, 3, 4).flatten(1, 2)
    return total[:, :, -1].sum(1).transpose(0, 1), mask
