"""grid_sample backend: one `F.grid_sample` and one 1x1 convolution a tap, with standard operators alone.

For devices without another backend, and for exporters. Half dtypes are sampled in float32, as coordinates need it.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Case, accumulation_dtype, combine_parts, match_layout, scale_channels, tap_positions


def why_not(case: Case) -> Optional[str]:
    return None


def forward(case: Case) -> Tensor:
    b, c, h, w = case.x.shape
    k, groups, (out_h, out_w) = case.kernel_size, case.dilation_groups, case.dilation.shape[2:]
    dtype = accumulation_dtype(case.x.dtype)
    d = case.dilation.to(dtype)
    # align_corners=False puts the centre of pixel p at (2p + 1) / size - 1, on maps of one pixel too
    rows = (2 * tap_positions(d, k, h, case.stride[0], case.padding[0], 2) + 1) / h - 1  # (B, H', W', k, G)
    cols = (2 * tap_positions(d, k, w, case.stride[1], case.padding[1], 3) + 1) / w - 1
    grid = torch.stack((
        cols[:, :, :, None].expand(-1, -1, -1, k, -1, -1),
        rows[:, :, :, :, None].expand(-1, -1, -1, -1, k, -1)), dim=-1)
    grid = grid.permute(3, 4, 0, 5, 1, 2, 6).reshape(k * k, b * groups, out_h, out_w, 2)

    x = case.x.to(dtype)
    mean, kernel = case.split_weight() if case.has_gains else (None, case.weight)
    if mean is not None:
        x = torch.cat((scale_channels(x, case.gains[2]), scale_channels(x, case.gains[0])), dim=1)
    # the channels of a dilation group together: (B, n*C, H, W) -> (B*G, n*C/G, H, W)
    n = x.shape[1] // c
    x = x.view(b, n, groups, c // groups, h, w).transpose(1, 2).reshape(b * groups, n * c // groups, h, w)
    mask = None if case.mask is None else case.mask.to(dtype).reshape(b * groups, k * k, 1, out_h, out_w)

    high, low = None, None
    for t in range(k * k):
        sample = F.grid_sample(x, grid[t], mode='bilinear', padding_mode='zeros', align_corners=False)
        if mask is not None:
            sample = sample * mask[:, t]
        sample = sample.view(b, groups, n, c // groups, out_h, out_w).transpose(1, 2).reshape(b, n * c, out_h, out_w)
        sample = sample.to(case.x.dtype)
        part = F.conv2d(sample[:, :c], kernel[:, :, t // k, t % k, None, None], groups=case.groups)
        high = part if high is None else high + part
        if n == 2:
            low = sample[:, c:] if low is None else low + sample[:, c:]
    assert high is not None
    if mean is None or low is None:
        y = high if case.bias is None else high + case.bias[:, None, None]
    else:
        y = combine_parts(high, F.conv2d(low, mean, groups=case.groups), case)
    return match_layout(y, case.x)
