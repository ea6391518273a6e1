"""grid_sample backend: one `F.grid_sample` for all taps and one 1x1 convolution, with standard operators alone.

For devices without another backend, and for exporters. Half dtypes are sampled in float32, as coordinates need it.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, accumulation_dtype, combine_parts, match_layout, scale_channels


def why_not(case: Case) -> Optional[str]:
    return None


def _coordinates(d: Tensor, tap: int, size: int, stride: int, padding: int, k: int, axis: int) -> Tensor:
    """Where a tap reads along one axis, as grid_sample wants it: (B, G, H', W') for the dilation d of that shape."""
    centre = torch.arange(d.shape[axis], device=d.device, dtype=d.dtype) * stride + (k // 2 - padding)
    # beyond -1 and size every weight is zero, and any finite position has an integer floor
    position = ((centre[:, None] if axis == 2 else centre) + d * (tap - k // 2)).clamp(-1, size)
    # align_corners=False puts the centre of pixel p at (2p + 1) / size - 1, on maps of one pixel too
    return (2 * position + 1) / size - 1


def _merge(t: Tensor) -> Tensor:
    """t (B, G, ...) to (B*G, ...). For one group not by a reshape, which would ask about symbolic sizes."""
    return t[:, 0] if t.shape[1] == 1 else t.flatten(0, 1)


def forward(case: Case) -> Tensor:
    b, c, h, w = case.x.shape
    k, groups, out_h = case.kernel_size, case.dilation_groups, case.dilation.shape[2]
    dtype = accumulation_dtype(case.x.dtype)
    d = case.dilation.to(dtype)
    rows = [_coordinates(d, tap, h, case.stride[0], case.padding[0], k, 2) for tap in range(k)]
    cols = [_coordinates(d, tap, w, case.stride[1], case.padding[1], k, 3) for tap in range(k)]

    # one below the other, (B, G, k*k*H', W') each; by cat, as a reshape would ask about symbolic sizes
    taps = range(k * k)
    grid = torch.stack((torch.cat([cols[t % k] for t in taps], 2), torch.cat([rows[t // k] for t in taps], 2)), dim=-1)

    x = case.x.to(dtype)
    mean, kernel = case.split_weight() if case.has_gains else (None, case.weight)
    if mean is not None:
        x = torch.cat((scale_channels(x, case.gains[2]), scale_channels(x, case.gains[0])), dim=1)
    # the channels of a dilation group together: (B, n*C, H, W) -> (B*G, n*C/G, H, W)
    n = x.shape[1] // c
    if groups > 1:
        x = x.unflatten(1, (n, groups, -1)).transpose(1, 2).flatten(2, 3)
        x = x.flatten(0, 1)
    samples = F.grid_sample(x, _merge(grid), mode='bilinear', padding_mode='zeros', align_corners=False)
    samples = samples.unflatten(2, (k * k, out_h))  # (B*G, n*C/G, k*k, H', W')
    if case.mask is not None:
        samples = samples * _merge(case.mask.to(dtype).unflatten(1, (groups, 1, k * k)))
    if groups > 1:
        samples = samples.unflatten(0, (b, groups)).unflatten(2, (n, -1)).transpose(1, 2).flatten(2, 3).flatten(1, 2)
    samples = samples.to(case.x.dtype)
    # the taps of a channel are channels of their own, in the order of the kernel's
    high = F.conv2d(samples[:, :c].flatten(1, 2), kernel.flatten(1)[:, :, None, None], groups=case.groups)
    if mean is None:
        y = high if case.bias is None else high + case.bias[:, None, None]
    else:
        y = combine_parts(high, F.conv2d(samples[:, c:].sum(2), mean, groups=case.groups), case)
    return match_layout(y, case.x)
