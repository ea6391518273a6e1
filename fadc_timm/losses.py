"""The paper's objective for AdaDR: small dilations where the features have high frequencies, large ones elsewhere.

    with record_dilations(model) as records:
        logits = model(x)
    loss = criterion(logits, y) + weight * dilation_frequency_loss(records)

A reconstruction: the authors' code trains AdaDR by the task's loss alone
(https://github.com/Linwei-Chen/FADC/issues/25), so details that the paper leaves open are chosen here, and said below.
"""
import math
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FADConv2d
from .layers.hooks import LayerCall, watch_layers
from .ops.runtime import accumulation_dtype, table_device, without_autocast

__all__ = ['DilationRecord', 'dilation_frequency_loss', 'high_frequency_power', 'power_at_outputs', 'record_dilations']

_CHUNK_BYTES = 2 ** 25  # of one set of coefficients; a few such sets are alive at once


class DilationRecord(NamedTuple):
    """The dilation that one AdaDR chose, and how much high frequency the map had at each position.

    name: Name of the FADConv2d in the model.
    dilation: (B, G, H', W') in pixels of the layer's input map, float32 or float64, in autograd's graph.
    power: (B, G, H', W') high-frequency power at the same positions, averaged over the channels of each group; it has
        no gradient.
    """
    name: str
    dilation: Tensor
    power: Tensor


def _fourier_basis(window: int, cutoff: float, like: Tensor) -> List[Tensor]:
    """Orthonormal rows: for the frequencies up to the cutoff (m, window), for the higher ones (window - m, window)."""
    i = torch.arange(window, dtype=torch.float64, device=table_device(like.device))
    rows = [torch.full_like(i, window ** -0.5)]
    for k in range(1, window // 2 + 1):
        angle = 2 * math.pi * k / window * i
        rows += [math.sqrt(2 / window) * torch.cos(angle), math.sqrt(2 / window) * torch.sin(angle)]
    basis = torch.stack(rows).to(like.dtype).to(like.device)
    m = 1 + 2 * sum(k / window <= cutoff for k in range(1, window // 2 + 1))
    return [basis[:m], basis[m:]]


def high_frequency_power(x: Tensor, window: int = 7, cutoff: float = 0.25, groups: int = 1) -> Tensor:
    """Power of a map above a frequency, in a window around each position.

    With X the discrete Fourier transform of the window, the power is the sum of |X(u, v)|^2 / window^4 over the
    frequencies with |u| or |v| above the cutoff. This equals the mean square, over the window, of the part of the map
    that these frequencies make. Beyond its border the map is replicated, because zeros would make an edge there.

    Args:
        x: Map (B, C, H, W) of any real dtype; half precisions are computed in float32, whatever the autocast.
        window: Odd side of the window, in pixels.
        cutoff: Frequency in cycles per pixel, below 0.5. The default is the highest frequency that samples 2 pixels
            apart can represent, so a dilation of 2 aliases the power above it.
        groups: Number of groups of channels; each group gets its own result.

    Returns:
        Mean over the channels of each group (B, groups, H, W), in squared units of x, float32 or float64. No gradient
        flows through it.

    Raises:
        ValueError: An argument is not as described above, or the window has no frequency above the cutoff.
    """
    if x.dim() != 4 or min(x.shape[1:]) < 1 or not x.is_floating_point():
        raise ValueError(f'x must be a real, not empty map (B, C, H, W), got {x.dtype} {list(x.shape)}.')
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f'window must be an odd number of pixels, got {window!r}.')
    if not 0 <= cutoff < window // 2 / window:
        raise ValueError(
            f'cutoff={cutoff!r} must be from 0 to below {window // 2 / window:.3g} cycles per pixel, the highest '
            f'frequency in a window of {window} pixels.')
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f'groups={groups} does not divide {x.shape[1]} channels.')
    b, c, h, w = x.shape
    with torch.no_grad(), without_autocast(x):
        x = x.detach().to(accumulation_dtype(x.dtype))
        low, high = _fourier_basis(window, cutoff, x)
        planes = x.reshape(b * c, 1, h, w)
        side = window // 2
        step = max(1, _CHUNK_BYTES // (x.element_size() * window * (h + 2 * side) * (w + 2 * side)))
        out = x.new_zeros((b * c, 1, h, w))
        for start in range(0, b * c, step):
            part = F.pad(planes[start:start + step], [side] * 4, mode='replicate')
            # high along the columns, any frequency along the rows: by Parseval's theorem the sum over all frequencies
            # along the rows is a sum over the window's columns
            columns = F.conv2d(part, high[:, None, :, None]).square_().sum(1, keepdim=True)
            power = F.avg_pool2d(columns, (1, window), 1) * window
            # low along the columns, high along the rows
            columns = F.conv2d(part, low[:, None, :, None])
            rows = F.conv2d(columns.reshape(-1, 1, h, w + 2 * side), high[:, None, None, :]).square_().sum(1)
            out[start:start + step] = power + rows.reshape(len(part), -1, h, w).sum(1, keepdim=True)
        return out.reshape(b, groups, c // groups, h, w).mean(2) / window ** 2


def power_at_outputs(power: Tensor, layer: FADConv2d, height: int, width: int) -> Tensor:
    """The values of a map (B, G, H, W) of a layer's input at the centres of its outputs: (B, G, height, width)."""
    first = layer.kernel_size[0] // 2 - layer.inner_padding

    def centres(count: int, size: int) -> Tensor:
        return (torch.arange(count, device=power.device) * layer.stride[0] + first).clamp(0, size - 1)

    return power[:, :, centres(height, power.shape[2])[:, None], centres(width, power.shape[3])]


@contextmanager
def record_dilations(model: nn.Module, window: int = 7, cutoff: float = 0.25) -> Iterator[List[DilationRecord]]:
    """Record the dilation of every AdaDR that runs in the `with` block, for :func:`dilation_frequency_loss`.

    The power is measured on the map that the layer samples, which is FreqSelect's output. It is computed at once and no
    features are kept, so gradient checkpointing saves as much memory as before. With timm's checkpointing, gradients
    flow as they do without it. With reentrant checkpointing (`use_reentrant=True`) gradients cannot flow, and the loss
    raises. Leave the block before the backward pass, because checkpointed layers run again there. Hooks do the
    recording. A model that `torch.compile` compiled before the block may skip them: then the block ends with an error.

    Args:
        model: Model with FADConv2d layers, also inside of DistributedDataParallel.
        window: See :func:`high_frequency_power`.
        cutoff: See :func:`high_frequency_power`.

    Yields:
        A list that gets one record per call of a layer with AdaDR, in the order of the calls.

    Raises:
        ValueError: The model has no FADConv2d layer; or, at the end of the block, none of them ran.
    """
    records: List[DilationRecord] = []

    def keep(call: LayerCall) -> None:
        if call.dilation is not None:
            groups, height, width = call.dilation.shape[1:]
            power = high_frequency_power(call.selected, window, cutoff, groups)
            records.append(
                DilationRecord(call.name, call.dilation, power_at_outputs(power, call.layer, height, width)))

    with watch_layers(model, keep):
        yield records


def _highest(values: Tensor, count: int) -> Tensor:
    """Weights (N, P) that pick the `count` highest of values (N, P) and sum to one.

    Equal values that compete for the last places share them, so the choice does not depend on the order of the values,
    and all positions of a constant map weigh the same. A NaN makes the weights of its row NaN.
    """
    threshold = values.topk(count, dim=1).values[:, -1:]
    above, tied = values > threshold, values == threshold
    places = (count - above.sum(1, keepdim=True)).to(values.dtype)
    return (above + tied * (places / tied.sum(1, keepdim=True))) / count


def dilation_frequency_loss(
        records: Sequence[DilationRecord],
        share: float = 0.25,
        limit: Optional[float] = None,
) -> Tensor:
    """Dilation where the high-frequency power is highest, minus dilation where it is lowest.

    The paper (section on AdaDR, Eq. 5) maximises, over AdaDR's parameters, the sum of the dilation over the positions
    HP- of lowest high-frequency power minus the sum over the positions HP+ of highest power. This is a reconstruction,
    because the authors' code has no such loss. Three things are chosen here. HP+ and HP- are the highest and lowest
    quarter (`share`) of an image's positions, per layer and dilation group. The loss takes means in place of sums, so
    its value depends neither on the image's size nor on the number of layers. HP+ and HP- are constants for autograd:
    gradients flow through the dilation alone, to AdaDR's convolution and to the map that this convolution reads.

    Nothing bounds the dilation of smooth positions from above, so a large weight makes it grow without end: choose a
    small weight, or set `limit`.

    Args:
        records: From :func:`record_dilations`.
        share: Share of the positions in HP+ and in HP-, above 0 and at most 0.5; at least one position.
        limit: Dilation, in pixels of a layer's input map, above which smooth positions are not pushed further.

    Returns:
        Scalar in pixels, float32 or float64, the mean over images, groups and records; negative where smooth positions
        have the larger dilation.

    Raises:
        ValueError: There are no records, a dilation and its power differ in shape, or share or limit is out of range.
        RuntimeError: Gradients are enabled, but no record has one.
    """
    if not records:
        raise ValueError('There is no dilation to take the loss of: no layer with AdaDR ran under record_dilations.')
    if not 0 < share <= 0.5:
        raise ValueError(f'share must be above 0 and at most 0.5, got {share!r}.')
    if limit is not None and not limit > 0:
        raise ValueError(f'limit must be a dilation above 0 or None, got {limit!r}.')
    if torch.is_grad_enabled() and not any(r.dilation.requires_grad for r in records):
        raise RuntimeError(
            'No dilation has a gradient: the model ran under no_grad or inference_mode, with reentrant gradient '
            'checkpointing, or is frozen. For the value alone call the loss under torch.no_grad().')
    total = []
    for r in records:
        if r.dilation.dim() != 4 or r.dilation.shape != r.power.shape or r.dilation.numel() == 0:
            raise ValueError(
                f'{r.name}: dilation and power must both be (B, G, H, W) and not empty, got {list(r.dilation.shape)} '
                f'and {list(r.power.shape)}.')
        dilation, power = r.dilation.flatten(0, 1).flatten(1), r.power.flatten(0, 1).flatten(1)
        count = max(1, int(share * power.shape[1]))
        textured, smooth = (_highest(p, count).to(dilation.dtype) for p in (power, -power))
        bounded = dilation if limit is None else dilation.clamp(max=limit)
        total.append((textured * dilation - smooth * bounded).sum(1).mean())
    return torch.stack([t.to(total[0]) for t in total]).mean()
