"""NAT and DiNAT: hierarchical transformers of neighbourhood attention, plain and dilated.

Papers:
* `Neighborhood Attention Transformer` - https://arxiv.org/abs/2204.07143
* `Dilated Neighborhood Attention Transformer` - https://arxiv.org/abs/2209.15001

The weights are the authors', https://huggingface.co/shi-labs, under their MIT licence.
"""
import re
from contextlib import suppress
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import NeighborhoodAttention
from ._checkpoint import check_keys, check_values, settle_head
from ._download import build_checked

__all__ = ['DiNAT']

_EPS = 1e-5  # of the norms


class ConvStem(nn.Module):
    """Two convolutions of stride 2, and a norm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        """
        Args:
            in_chans: Number of input channels.
            dim: Number of output channels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(dim, eps=_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, dim, ceil(H / 4), ceil(W / 4))."""
        return self.norm(self.conv2(self.conv1(x)))


class Downsample(nn.Module):
    """A convolution that doubles the channels, and halves the map or is dilated in place of that, and a norm."""

    def __init__(self, dim: int, stride: int = 2, dilation: int = 1, device=None, dtype=None) -> None:
        """
        Args:
            dim: Number of input channels.
            stride: Stride.
            dilation: Dilation.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.reduction = nn.Conv2d(
            dim, 2 * dim, 3, stride=stride, padding=dilation, dilation=dilation, bias=False, **dd)
        self.norm = LayerNorm2d(2 * dim, eps=_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, 2*C, H', W')."""
        return self.norm(self.reduction(x))


class DiNATBlock(nn.Module):
    """Neighbourhood attention and an MLP, each behind a norm."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int,
            dilation: int,
            mlp_ratio: float = 3.,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            layer_scale_init_value: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Number of channels.
            num_heads: Number of heads.
            kernel_size: Odd size of the window.
            dilation: Distance of neighbours.
            mlp_ratio: Channels of the MLP in multiples of dim.
            qkv_bias: Add a bias to queries, keys and values.
            proj_drop: Dropout of projections.
            attn_drop: Dropout of attention weights.
            drop_path: Stochastic depth.
            layer_scale_init_value: What scales each branch at the start; 0 for no layer scale.
            act_layer: Activation of the MLP.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()

        def scale() -> nn.Module:
            return LayerScale(dim, layer_scale_init_value, **dd) if layer_scale_init_value > 0 else nn.Identity()

        self.norm1 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=_EPS, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) to the same shape."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DiNATStage(nn.Module):
    """A downsampler, if any, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[DiNATBlock]) -> None:
        """
        Args:
            downsample: What comes before the blocks.
            blocks: The blocks.
        """
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) to (B, C', H', W'), channels_last: a view of what the blocks put out."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


def _per_block(dilations: Any, depths: Sequence[int]) -> List[List[int]]:
    """The dilation of every block, by stages."""
    if dilations is None:
        dilations = 1
    if isinstance(dilations, int):
        return [[dilations] * depth for depth in depths]
    found = [list(stage) if isinstance(stage, (list, tuple)) else [stage] * depth
             for stage, depth in zip(dilations, depths)]
    if len(dilations) != len(depths) or [len(stage) for stage in found] != list(depths):
        raise ValueError(f'dilations must have a dilation for each block, {list(depths)} by stages, got {dilations!r}.')
    return found


class DiNAT(nn.Module):
    """Dilated Neighborhood Attention Transformer; with dilation 1 everywhere it is the Neighborhood Attention
    Transformer.

    Images of any size are taken. Maps between stages are (B, C, H, W), channels_last in memory.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: int = 32,
            embed_dim: int = 64,
            depths: Sequence[int] = (3, 4, 6, 5),
            num_heads: Sequence[int] = (2, 4, 8, 16),
            kernel_size: int = 7,
            dilations: Optional[Sequence[Union[int, Sequence[int]]]] = None,
            mlp_ratio: float = 3.,
            qkv_bias: bool = True,
            layer_scale_init_value: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = 'gelu',
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.1,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chans: Number of input channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Global pooling.
            output_stride: Stride of the last map, 8, 16 or 32. Where a downsampler keeps the size, what follows is
                dilated: at the positions of the smaller map it computes what it did there.
            embed_dim: Channels of the first stage; each of the others has twice as many as the one before.
            depths: Blocks of each stage.
            num_heads: Heads of each stage.
            kernel_size: Odd size of the window.
            dilations: Distance of neighbours, one for each stage or for each block of each stage; None for 1.
            mlp_ratio: Channels of the MLPs in multiples of those of the stage.
            qkv_bias: Add a bias to queries, keys and values.
            layer_scale_init_value: What scales each residual branch at the start; 0 for no layer scale.
            act_layer: Activation of the MLPs.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout of projections.
            attn_drop_rate: Dropout of attention weights.
            drop_path_rate: Stochastic depth.

        Raises:
            ValueError: The output stride is none of these, or depths, heads and dilations do not fit each other.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}.')
        if len(num_heads) != len(depths):
            raise ValueError(f'num_heads must have one number for each of {len(depths)} stages, got {num_heads!r}.')
        activation: Any = get_act_layer(act_layer)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.feature_info: List[Dict[str, Any]] = []
        self.patch_embed = ConvStem(in_chans, embed_dim, **dd)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        dim, reduction, wider = embed_dim, 4, 1
        for i, (depth, heads, spacings) in enumerate(zip(depths, num_heads, _per_block(dilations, depths))):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                stride = 2 if reduction < output_stride else 1
                downsample = Downsample(dim, stride, wider, **dd)
                dim, reduction, wider = 2 * dim, reduction * stride, wider * (2 // stride)
            stages.append(DiNATStage(downsample, [
                DiNATBlock(
                    dim, heads, kernel_size, spacings[j] * wider, mlp_ratio, qkv_bias, proj_drop_rate, attn_drop_rate,
                    drop_paths[i][j], layer_scale_init_value, activation, **dd)
                for j in range(depth)]))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.norm = LayerNorm2d(dim, eps=_EPS, **dd)
        self.head = ClassifierHead(dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all parameters as the authors do: linear layers from a normal distribution of deviation 0.02.

        Args:
            needs_reset: Reset the modules of other kinds too, which do so themselves when they are made.
        """
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif needs_reset and hasattr(m, 'reset_parameters'):
                m.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith('.rpb')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """How timm groups parameters by depth."""
        return dict(
            stem=r'^patch_embed',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks again in the backward pass, or keep what they computed."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: Global pooling, None for that of today.
        """
        self.num_classes = num_classes
        own = next(self.parameters())
        self.head.reset(num_classes, global_pool)
        self.head.to(device=own.device, dtype=own.dtype)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """The maps of stages.

        Args:
            x: Images (B, C, H, W).
            indices: Which stages; the last ones if it is a number, all if it is None.
            norm: Apply the last norm to the map of the last stage.
            stop_early: Leave out the stages behind the last index.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps alone.

        Returns:
            The final map and the maps, or the maps.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.patch_embed(x)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice them
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the stages that are not needed for the maps of some stages.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Drop the last norm.
            prune_head: Drop the head.

        Returns:
            The indices that are kept.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        is_cut = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_norm or is_cut:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head or is_cut:
            self.reset_classifier(0, '')
        if is_cut:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the last map (B, C', H', W')."""
        return self.norm(self.stages(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to what the classifier takes."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Parts of names in checkpoints of the authors' code, and ours.
_AUTHORS_NAMES = (
    (r'^patch_embed\.proj\.0\.', 'patch_embed.conv1.'), (r'^patch_embed\.proj\.1\.', 'patch_embed.conv2.'),
    (r'^levels\.(\d+)\.blocks\.', r'stages.\1.blocks.'), (r'\.gamma([12])$', r'.ls\1.gamma'),
    (r'^head\.', 'head.fc.'))

# The same for checkpoints of transformers.
_NAMES = (
    ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2'), ('intermediate.dense', 'mlp.fc1'),
    ('attention.self.rpb', 'attn.rpb'), ('attention.output.dense', 'attn.proj'), ('output.dense', 'mlp.fc2'))


def _convert_authors(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A checkpoint of the authors' code, with our names."""
    out: Dict[str, Tensor] = {}
    for name, value in state_dict.items():
        for theirs, ours in _AUTHORS_NAMES:
            name = re.sub(theirs, ours, name)
        out[_of_next_stage(name, 'levels')] = value
    return out


def _of_next_stage(name: str, levels: str) -> str:
    """The name of a downsampler: it ends a stage there, and begins the next one here."""
    return re.sub(
        rf'^{levels}\.(\d+)\.downsample\.', lambda found: f'stages.{int(found[1]) + 1}.downsample.', name)


def _convert(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A checkpoint with the names of transformers' Dinat and Nat, with ours."""
    out: Dict[str, Tensor] = {}
    projections: Dict[str, Dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        name = re.sub(r'^(dinat|nat)\.', '', key)
        name = re.sub(r'^classifier\.', 'head.fc.', name)
        name = re.sub(r'^layernorm\.', 'norm.', name)
        name = name.replace('embeddings.norm.', 'patch_embed.norm.')
        name = re.sub(
            r'^embeddings\.patch_embeddings\.projection\.([01])\.',
            lambda found: f'patch_embed.conv{int(found[1]) + 1}.', name)
        name = _of_next_stage(name, r'encoder\.levels')
        name = re.sub(r'^encoder\.levels\.(\d+)\.layers\.(\d+)\.', r'stages.\1.blocks.\2.', name)
        found = re.fullmatch(r'(.+)\.attention\.self\.(query|key|value)\.(weight|bias)', name)
        if found:
            projections.setdefault(f'{found[1]}.attn.qkv.{found[3]}', {})[found[2]] = value
            continue
        if name.endswith('.layer_scale_parameters'):
            block = name.rpartition('.')[0]
            out[f'{block}.ls1.gamma'], out[f'{block}.ls2.gamma'] = value.unbind(0)
            continue
        for theirs, ours in _NAMES:
            if f'.{theirs}' in name:
                name = name.replace(f'.{theirs}', f'.{ours}')
                break
        out[name] = value
    for name, parts in projections.items():
        with suppress(KeyError):  # one is missing: named below, as the name in the model is
            out[name] = torch.cat([parts[part] for part in ('query', 'key', 'value')])
    return out


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """A checkpoint of transformers' Dinat or Nat, as `shi-labs` has them on the Hub, of the authors' code, or ours."""
    state_dict = state_dict.get('state_dict', state_dict)
    state_dict = state_dict.get('model', state_dict)
    if any('encoder.levels.0.' in key for key in state_dict):
        return _convert(state_dict)
    if any(key.startswith('levels.0.') for key in state_dict):
        return _convert_authors(state_dict)
    return state_dict


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build an architecture; see :func:`fadc_timm.models._family.create` for errors with weights."""
    features_only = bool(kwargs.get('features_only'))

    def filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
        state_dict = checkpoint_filter_fn(state_dict, model)
        own, cfg = model.state_dict(), getattr(model, 'pretrained_cfg', None) or {}
        check_keys(state_dict, own, f'does not fit {variant}', cfg.get('classifier'))
        check_values(state_dict, own)
        if not features_only:
            settle_head(state_dict, model)
        return state_dict

    def build(pretrained: bool) -> nn.Module:
        return build_model_with_cfg(
            DiNAT, variant, pretrained, pretrained_filter_fn=filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs)

    return build_checked(build, variant, pretrained, kwargs)


_NAT_ORIGIN = dict(paper_ids='arXiv:2204.07143', paper_name='Neighborhood Attention Transformer')
_DINAT_ORIGIN = dict(paper_ids='arXiv:2209.15001', paper_name='Dilated Neighborhood Attention Transformer')


def _cfg(hf_hub_id: Optional[str] = None, **kwargs: Any) -> Dict[str, Any]:
    return {
        'hf_hub_id': hf_hub_id, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.conv1', 'classifier': 'head.fc', 'license': 'mit',
        'origin_url': 'https://github.com/SHI-Labs/Neighborhood-Attention-Transformer', **kwargs}


_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs({
    'nat_mini.in1k_224': _cfg('shi-labs/nat-mini-in1k-224', **_NAT_ORIGIN),
    'nat_tiny.in1k_224': _cfg('shi-labs/nat-tiny-in1k-224', **_NAT_ORIGIN),
    'nat_small.in1k_224': _cfg('shi-labs/nat-small-in1k-224', **_NAT_ORIGIN),
    'nat_base.in1k_224': _cfg('shi-labs/nat-base-in1k-224', **_NAT_ORIGIN),
    'dinat_mini.in1k_224': _cfg('shi-labs/dinat-mini-in1k-224', **_DINAT_ORIGIN),
    'dinat_tiny.in1k_224': _cfg('shi-labs/dinat-tiny-in1k-224', **_DINAT_ORIGIN),
    'dinat_small.in1k_224': _cfg('shi-labs/dinat-small-in1k-224', **_DINAT_ORIGIN),
    'dinat_base.in1k_224': _cfg('shi-labs/dinat-base-in1k-224', **_DINAT_ORIGIN),
    'dinat_large.in22k_ft_in1k_224': _cfg('shi-labs/dinat-large-in22k-in1k-224', **_DINAT_ORIGIN),
    'dinat_large_384.in22k_ft_in1k_384': _cfg('shi-labs/dinat-large-in22k-in1k-384', **_384, **_DINAT_ORIGIN),
    'dinat_large_k11_384.in22k_ft_in1k_384': _cfg(
        'shi-labs/dinat-large-11x11-in22k-in1k-384', **_384, **_DINAT_ORIGIN),
    'test_dinat': _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0, **_DINAT_ORIGIN),
})


def _alternating(depths: Sequence[int], *spacings: int) -> Tuple[Tuple[int, ...], ...]:
    """Every other block of a stage is dilated, beginning with the second one."""
    return tuple(tuple(d if j % 2 else 1 for j in range(depth)) for depth, d in zip(depths, spacings))


_MINI = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.)
_TINY = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3.)
_SMALL = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.)
_BASE = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2., layer_scale_init_value=1e-5)
_LARGE = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.)


def _dilated(size: Dict[str, Any], *spacings: int) -> Dict[str, Any]:
    return dict(size, dilations=_alternating(size['depths'], *(spacings or (8, 4, 2, 1))))


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Mini."""
    return _create('nat_mini', pretrained, **dict(_MINI, **kwargs))


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Tiny."""
    return _create('nat_tiny', pretrained, **dict(_TINY, **kwargs))


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Small."""
    return _create('nat_small', pretrained, **{**_SMALL, 'layer_scale_init_value': 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Base."""
    return _create('nat_base', pretrained, **dict(_BASE, **kwargs))


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Mini."""
    return _create('dinat_mini', pretrained, **dict(_dilated(_MINI), **kwargs))


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Tiny."""
    return _create('dinat_tiny', pretrained, **dict(_dilated(_TINY), **kwargs))


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Small."""
    return _create('dinat_small', pretrained, **dict(_dilated(_SMALL), **kwargs))


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Base."""
    return _create('dinat_base', pretrained, **dict(_dilated(_BASE), **kwargs))


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large."""
    return _create('dinat_large', pretrained, **dict(_dilated(_LARGE), **kwargs))


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large with the dilations of 384 pixels."""
    return _create('dinat_large_384', pretrained, **dict(_dilated(_LARGE, 13, 6, 3, 1), **kwargs))


@register_model
def dinat_large_k11_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large with windows of 11 by 11."""
    return _create('dinat_large_k11_384', pretrained, **{**_dilated(_LARGE), 'kernel_size': 11, **kwargs})


@register_model
def test_dinat(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small DiNAT for tests, without weights."""
    args: Dict[str, Any] = dict(
        embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2., kernel_size=3,
        dilations=((2,), (1,), (1, 2), (1,)))
    return _create('test_dinat', pretrained, **dict(args, **kwargs))
