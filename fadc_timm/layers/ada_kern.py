"""Adaptive Kernel (AdaKern): reweigh the low and the high frequency part of a kernel by the input.

Paper, section 3: `Frequency-Adaptive Dilated Convolution for Semantic Segmentation` -
https://arxiv.org/abs/2403.05369
"""
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import get_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_linear_bn_weights

from ..ops import gains
from ..ops.runtime import is_exporting, without_autocast
from .own_hooks import has_hooks

__all__ = ['AdaKern', 'Head', 'NormLayer', 'mean_dtype']

# What makes a norm: a name of timm's, or a callable that takes a number of channels, device and dtype.
NormLayer = Union[str, Callable[..., nn.Module]]


def _make_norm(norm_layer: NormLayer, width: int, parts: int, **dd: Any) -> nn.Module:
    """A norm of parts * width channels in which the parts do not meet.

    Raises:
        ValueError: norm_layer makes no BatchNorm of maps, LayerNorm or GroupNorm, or none of so many channels.
    """
    try:
        make: Any = get_norm_layer(norm_layer) if isinstance(norm_layer, str) else norm_layer
    except KeyError:
        make = None
    is_kind = not isinstance(make, type) or issubclass(make, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))
    try:
        norm = make(width, **dd) if callable(make) and is_kind else None
    except ValueError as e:
        raise ValueError(
            f"norm_layer, which is ada_kern_norm in FADConv2d, does not take the trunk's {width} channels, got "
            f'{norm_layer!r}: {e}.') from e
    if isinstance(norm, _BatchNorm) and not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        return make(parts * width, **dd)
    # in one call: a group per part is a LayerNorm of each part
    if isinstance(norm, nn.LayerNorm):
        return nn.GroupNorm(parts, parts * width, norm.eps, norm.elementwise_affine, **dd)
    if isinstance(norm, nn.GroupNorm):
        return nn.GroupNorm(parts * norm.num_groups, parts * width, norm.eps, norm.affine, **dd)
    raise ValueError(
        'norm_layer, which is ada_kern_norm in FADConv2d, must make a BatchNorm of maps, a LayerNorm or a GroupNorm: '
        f"one of timm's names, as 'batchnorm2d' or 'layernorm2d', or a callable; got {norm_layer!r}.")


# Norms that compute in the dtype of their input, under autocast too.
_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.Identity)


def mean_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a map's mean goes through the linear layers: under autocast float32, except for float64."""
    autocast = x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)
    return torch.float32 if autocast and x.dtype != torch.float64 else x.dtype


def _normalize_one(norm: Any, x: Tensor) -> Tensor:
    """A BatchNorm of one value per channel (1, K, 1, 1), or none, where a batch's statistics are asked for.

    By the running statistics, which stay as they are, except where they accumulate (`momentum` is None, as torch's
    `update_bn` sets it): there they take the value in. Without running statistics the value is its own mean.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None:
        x = x - x.mean(0, keepdim=True)
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    elif norm.momentum is None and norm.track_running_stats and len(x):
        norm.num_batches_tracked.add_(1)
        with torch.no_grad():
            distance = x.flatten().to(mean.dtype) - mean
            share = 1 / norm.num_batches_tracked
            mean.add_(share * distance)
            var.add_(share * distance.square()).mul_(1 - share)
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0., norm.eps)


class Head(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        """Back to zero."""
        for parameter in (self.weight, self.bias):
            nn.init.zeros_(parameter)


class AdaKern(nn.Module):
    """Gains for the two parts of a kernel: its mean over the taps (low) and the rest (high).

    `W' = low_out * low_in * mean(W) + high_out * high_in * (W - mean(W))`, with a gain in [0, 2] for each sample and
    input channel, and one for each sample and output channel. The heads start at zero, so all gains start at one.
    Whatever samples the map takes the gains: the module knows nothing of dilation.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_decompose: str = 'both',
            depthwise: bool = False,
            reduction: int = 16,
            min_channels: int = 16,
            norm_layer: NormLayer = 'batchnorm2d',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Number of input channels of the kernel.
            out_channels: Number of its output channels.
            kernel_decompose: Which parts have gains: 'both', 'low' or 'high'; the other part keeps gain one.
            depthwise: The kernel is depthwise: input gains only.
            reduction: The trunk has in_channels // reduction channels.
            min_channels: The least number of the trunk's channels.
            norm_layer: The trunk's norm: 'batchnorm2d', as in the authors' code; 'layernorm2d', per image and part, so
                that no image depends on others; another of timm's names, or a callable, that makes a BatchNorm,
                LayerNorm or GroupNorm. The last two are each made as one GroupNorm for both parts.

        Raises:
            ValueError: There is no such kernel_decompose or norm_layer, or the norm does not take so many channels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if kernel_decompose not in ('both', 'low', 'high'):
            raise ValueError(
                f"kernel_decompose must be 'both', 'low' or 'high', or 'none' in FADConv2d, got {kernel_decompose!r}.")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_decompose = kernel_decompose
        self.depthwise = depthwise
        self.parts = parts = 2 if kernel_decompose == 'both' else 1
        width = max(in_channels // reduction, min_channels)
        heads = in_channels if depthwise else in_channels + out_channels
        # the trunks of both parts read the same vector: one product, low before high; so do the heads of a part
        self.fc = nn.Linear(in_channels, parts * width, bias=False, **dd)
        # Any, as SyncBatchNorm may replace it, and reparameterize() does
        self.norm: Any = _make_norm(norm_layer, width, parts, **dd)
        # a configuration holds names
        name = 'batchnorm2d' if isinstance(self.norm, _BatchNorm) else 'layernorm2d'
        self.norm_layer = norm_layer if isinstance(norm_layer, str) else name
        self.act = nn.ReLU()
        self.low = None if kernel_decompose == 'high' else Head(width, heads, **dd)
        self.high = None if kernel_decompose == 'low' else Head(width, heads, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to gains of one."""
        nn.init.kaiming_normal_(self.fc.weight, mode='fan_out', nonlinearity='relu')
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)
        if isinstance(self.norm, (_BatchNorm, nn.GroupNorm)):
            self.norm.reset_parameters()
        for head in (self.low, self.high):
            if head is not None:
                head.reset_parameters()

    def reparameterize(self) -> None:
        """Fold a BatchNorm's running statistics into the trunk, for inference.

        `timm.utils.reparameterize_model` calls it. Once folded, there is no norm in training either, and nothing is
        left to fold. Other norms stay, as their statistics are those of the images.
        """
        norm = self.norm
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            mean, var = norm.running_mean, norm.running_var
            weight = torch.ones_like(var) if norm.weight is None else norm.weight
            bias = torch.zeros_like(mean) if norm.bias is None else norm.bias
            self.fc.weight, self.fc.bias = fuse_linear_bn_weights(
                self.fc.weight, self.fc.bias, mean, var, norm.eps, weight, bias)
            self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """
        Args:
            x: Map (B, C, H, W), C = in_channels, before any padding.

        Returns:
            (low_in (B, C), low_out (B, O), high_in (B, C), high_out (B, O)), None where a gain is one by construction.
        """
        low, high = self.predict(x)
        if not torch.jit.is_scripting():
            if low is not None and high is not None and is_exporting():
                return self._exported_gains(low, high)
        low_in, low_out = self._gains(low)
        high_in, high_out = self._gains(high)
        return low_in, low_out, high_in, high_out

    def predict(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """The gains before their activation, 2 * sigmoid.

        Args:
            x: Map (B, C, H, W), before any padding.

        Returns:
            Of the low and of the high part (B, C + O), or (B, C) for a depthwise kernel; None where gains are one.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f'AdaKern wants (B, {self.in_channels}, H, W), got {list(x.shape)}.')
        if torch.jit.is_scripting():
            return self._heads(x.mean(dim=(2, 3)))
        return self._without_autocast(x)

    @torch.jit.unused
    def _without_autocast(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        return self.predict_from_mean(x.mean(dim=(2, 3), dtype=mean_dtype(x)))

    @torch.jit.unused
    def predict_from_mean(self, mean: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """:meth:`predict` from the mean (B, C) of the map.

        Not under autocast, which would cast each of five small parameters, and save nothing on vectors.
        """
        weight = getattr(self.fc, 'weight', None)  # a method where the layer is quantised
        if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16) and (
                mean.dtype == torch.float32):
            mean = mean.to(weight.dtype)  # a model in half precision under autocast
        with without_autocast(mean):
            return self._heads(mean)

    @torch.jit.unused
    def predict_in_kernels(
            self, x: Tensor, means: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """:meth:`predict` where Triton's kernels run: trunk and heads are a kernel each, and the norm is between them.

        Args:
            x: Map (B, C, H, W).
            means: (B, n, C), whose sum over n is the mean of x, or None.
        """
        dtype = mean_dtype(x)
        if means is None:
            means = x.mean(dim=(2, 3), dtype=dtype)[:, None]
        if not self._runs_in_kernels(x):
            return self.predict_from_mean(means.sum(1).to(dtype))
        y = gains.trunk(means, self.fc.weight, self.fc.bias)
        if type(self.norm) in _NORMS:
            y = self._normalize(y)
        else:
            with without_autocast(y):
                y = self._normalize(y)
        if self.low is None or self.high is None:
            head = self.high if self.low is None else self.low
            assert head is not None
            only, _ = gains.heads(y, head.weight, head.bias)
            return (None, only) if self.low is None else (only, None)
        return gains.heads(y, self.low.weight, self.low.bias, self.high.weight, self.high.bias)

    def _runs_in_kernels(self, x: Tensor) -> bool:
        """Whether trunk and heads are what they were made as, so that kernels can take the place of these modules.

        Not while exporting, as other runtimes have no such kernels, and not on meta, where nothing runs.
        """
        heads = [head for head in (self.low, self.high) if head is not None]
        if (x.device.type == 'meta' or is_exporting() or type(self.fc) is not nn.Linear
                or type(self.act) is not nn.ReLU or any(type(head) is not Head for head in heads)
                or has_hooks(self.fc, self.act, *heads)):
            return False
        parameters = [self.fc.weight, *(p for head in heads for p in (head.weight, head.bias))]
        if self.fc.bias is not None:
            parameters.append(self.fc.bias)
        dtype = mean_dtype(x)
        # a subclass of Tensor may compute in another way: quantised, or in shards
        return all(type(p) in (Tensor, nn.Parameter) and p.dtype == dtype and p.device == x.device
                   for p in parameters)

    def _heads(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        x = self.fc(x)
        if torch.jit.is_scripting():
            parts = self.act(self._scripted_norm(x[:, :, None, None]).flatten(1)).chunk(self.parts, 1)
        else:
            parts = self._normalized_parts(x)
        low: Optional[Tensor] = None
        high: Optional[Tensor] = None
        if self.low is not None:
            low = self.low(parts[0])
        if self.high is not None:
            high = self.high(parts[-1])
        return low, high

    def _scripted_norm(self, x: Tensor) -> Tensor:
        """:meth:`_normalize` in TorchScript, where only a BatchNorm has running statistics."""
        if hasattr(self.norm, 'running_mean'):
            if self.norm.training and x.shape[0] == 1:
                return F.batch_norm(
                    x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, False, 0.,
                    self.norm.eps)
        return self.norm(x)

    @torch.jit.unused
    def _normalized_parts(self, x: Tensor) -> List[Tensor]:
        """The trunks of the parts behind norm and activation."""
        norm = self.norm
        if is_exporting() and isinstance(norm, nn.GroupNorm) and norm.affine and norm.num_groups == self.parts:
            # other runtimes have a LayerNorm, and write a GroupNorm out; slices of parameters become constants
            width = self.fc.out_features // self.parts
            rows = [slice(i * width, (i + 1) * width) for i in range(self.parts)]
            return [self.act(F.layer_norm(part, (width,), norm.weight[r], norm.bias[r], norm.eps))
                    for part, r in zip(x.chunk(self.parts, 1), rows)]
        return list(self.act(self._normalize(x)).chunk(self.parts, 1))

    @torch.jit.unused
    def _normalize(self, x: Tensor) -> Tensor:
        """The norm, of one value per channel too, which has no variance.

        timm's split BatchNorm gives every part of the batch to a norm of its own.
        """
        norm = self.norm
        if isinstance(norm, (nn.GroupNorm, nn.Identity)):
            return norm(x)
        if is_exporting() and isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None:
            # which a product takes up, and a map of one pixel would not
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0., norm.eps)
        x = x[:, :, None, None]
        synced = isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1
        if not isinstance(norm, _BatchNorm) or synced or not (norm.training or norm.running_mean is None):
            return norm(x).flatten(1)
        norms = [norm, *getattr(norm, 'aux_bn', ())] if norm.training else [norm]
        if x.shape[0] not in (0, len(norms)):
            return norm(x).flatten(1)
        return torch.cat([_normalize_one(n, part) for part, n in zip(x.split(1), norms)]).flatten(1)

    def _gains(self, x: Optional[Tensor]) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """The gains of the input and of the output channels, from x, which holds those of the input first."""
        if x is None:
            return None, None
        gains = 2 * torch.sigmoid(x)
        if self.depthwise:
            return gains, None
        return gains[:, :self.in_channels], gains[:, self.in_channels:]

    @torch.jit.unused
    def _exported_gains(
            self, low: Tensor, high: Tensor,
    ) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        """The gains of both parts at once, in few nodes of a graph."""
        gains = 2 * torch.sigmoid(torch.cat((low, high), 1))
        if self.depthwise:
            low_in, high_in = gains.chunk(2, 1)
            return low_in, None, high_in, None
        low_in, low_out, high_in, high_out = gains.split([self.in_channels, self.out_channels] * 2, 1)
        return low_in, low_out, high_in, high_out

    def _load_from_state_dict(
            self,
            state_dict: Dict[str, Any],
            prefix: str,
            local_metadata: Dict[str, Any],
            strict: bool,
            missing_keys: List[str],
            unexpected_keys: List[str],
            error_msgs: List[str],
    ) -> None:
        """As that of `nn.Module`, with an error where the weights are those of a BatchNorm, and the norm is none.

        Without strictness too, where torch would drop the running statistics.
        """
        if isinstance(self.norm, nn.GroupNorm) and f'{prefix}norm.running_mean' in state_dict:
            error_msgs.append(f"{prefix}norm is a BatchNorm in the weights and a GroupNorm here: AdaKern's option "
                              "norm_layer, ada_kern_norm of layers and models, is 'batchnorm2d' for these weights.")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, kernel_decompose={self.kernel_decompose!r}'
