"""torchvision's detectors with a feature pyramid over timm's backbones and their FADC variants."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from fadc_timm.models.lift import _stages_of
from scripts.training.variants import added_keys, apply_variant, split_name
from scripts.training.weights import find_init, load_backbone

DETECTORS: dict[str, type[nn.Module]] = {'faster_rcnn': FasterRCNN, 'retinanet': RetinaNet, 'mask_rcnn': MaskRCNN}
_STRIDES = {'faster_rcnn': (4, 8, 16, 32), 'retinanet': (8, 16, 32), 'mask_rcnn': (4, 8, 16, 32)}


@dataclass(frozen=True)
class Built:
    """A detector.

    model: One of torchvision's, with its names and arguments of `forward`.
    replaced: Convolutions of the backbone that its variant replaced, as named in the backbone.
    loaded: What was loaded into the backbone, and from where, in words.
    frozen: Number of parameters and batch norms of the backbone that are not trained, in words.
    """
    model: nn.Module
    replaced: list[str]
    loaded: str
    frozen: str


class Pyramid(nn.Module):
    """A feature pyramid over a feature network of timm's. Checkpoints name the network `backbone.timm_model`.

    Args:
        timm_model: A `features_only` model.
        levels: Which of its features.
        width: Channels of the pyramid.
        extra: Levels above the last feature.
    """

    def __init__(self, timm_model: nn.Module, levels: Sequence[int], width: int, extra: ExtraFPNBlock) -> None:
        super().__init__()
        self.timm_model, self.levels, self.out_channels = timm_model, tuple(levels), width
        info: Any = timm_model.feature_info
        self.fpn = FeaturePyramidNetwork([info.channels()[i] for i in levels], width, extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps by level, from images (B, 3, H, W), whose sides are multiples of 32."""
        features = self.timm_model(x)
        return self.fpn({str(n): features[i] for n, i in enumerate(self.levels)})


def freeze(net: nn.Module, stages: int, batch_norm: bool) -> str:
    """Freeze the first stages of a backbone, and its batch norms, in place; never what a variant added to it.

    AdaKern's norm is untrained when a network is lifted, so its statistics are no statistics yet.

    Args:
        net: A feature network.
        stages: The stem and so many stages lose the gradients of their parameters; 0 for none.
        batch_norm: All batch norms keep their statistics, weights and biases. Without it those in frozen stages do.

    Returns:
        What was frozen, in words.

    Raises:
        ValueError: The network has fewer stages.
    """
    added = set(added_keys(net))
    names = [name for name, _ in net.named_modules()]
    frozen: set[str] = set()
    if stages:
        found = _stages_of(net)
        if stages > len(found):
            raise ValueError(f'--frozen-stages must be at most the {len(found)} stages of the network, got {stages}')
        frozen = set(names[:max(names.index(name) for name in found[stages - 1][1]) + 1])
    norms = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm)
             and f'{name}.running_mean' not in added and (batch_norm or name in frozen)]
    for name in norms:
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, freeze_batch_norm_2d(net.get_submodule(name)))
    count = 0
    for name, parameter in net.named_parameters():
        if name not in added and name.rpartition('.')[0] in frozen:
            parameter.requires_grad_(False)
            count += parameter.numel()
    return f'{stages} stages with {count} parameters, {len(norms)} batch norms'


def build(
        backbone: str,
        classes: int,
        variant: str = 'plain',
        detector: str = 'faster_rcnn',
        fpn_channels: int = 256,
        short: Sequence[int] = (800,),
        long: int = 1333,
        init: str = '',
        fadc: dict[str, Any] | None = None,
        freq_select_stages: Sequence[int] = (2, 3, 4),
        backbone_args: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        frozen_stages: int = 0,
        frozen_bn: bool = False,
        seed: int = 0,
) -> Built:
    """Build a detector. Variants of one seed have the same weights in the backbone, and the same heads, at the start.

    Args:
        backbone: timm's name, or that of one of our models.
        classes: Number of classes, without the background.
        variant: Variant of the backbone.
        detector: One of `DETECTORS`.
        fpn_channels: Width of the feature pyramid.
        short: Pixels that the short side of an image is resized to: one of them in training, the last one in test.
        long: Pixels that the long side of an image has at most.
        init: Tag of timm's weights or `default`, path of a checkpoint, or nothing for random weights.
        fadc: Options of FADConv2d beyond the variant's.
        freq_select_stages: Stages with FreqSelect, where the variant has it.
        backbone_args: More arguments of `timm.create_model`, as `drop_path_rate`.
        mean: Of the channels of images in [0, 1]; None for ImageNet's.
        std: Likewise.
        frozen_stages: The stem and so many stages are not trained, except what the variant added.
        frozen_bn: The backbone's batch norms are not trained, except AdaKern's.
        seed: Of the random weights.

    Raises:
        ValueError: A name or value that there is not; the message names it.
        RuntimeError: The checkpoint does not fit.
    """
    if detector not in DETECTORS:
        raise ValueError(f'There is no detector {detector!r}: the detectors are {", ".join(DETECTORS)}.')
    base, variant = split_name(backbone, variant)
    initial = find_init(base, init, variant, dict(fadc or {})) if init else None
    torch.manual_seed(seed)
    try:
        net = timm.create_model(base, features_only=True, **(backbone_args or {}))
    except (AttributeError, RuntimeError) as e:
        raise ValueError(f'{base} gives no feature maps: {e}') from e
    info: Any = net.feature_info
    strides = list(info.reduction())
    wanted = _STRIDES[detector]
    if any(strides.count(stride) != 1 for stride in wanted):
        raise ValueError(f'{detector} needs a feature map at each of the strides {", ".join(map(str, wanted))}; '
                         f'those of {base} have {", ".join(map(str, strides))}')
    levels = [strides.index(stride) for stride in wanted]
    retina = detector == 'retinanet'
    extra = LastLevelP6P7(fpn_channels, fpn_channels) if retina else LastLevelMaxPool()
    model = DETECTORS[detector](
        Pyramid(net, levels, fpn_channels, extra), num_classes=classes + 1, min_size=tuple(short),
        max_size=long, image_mean=mean, image_std=std)
    options = {**(initial.options if initial else {}), **(fadc or {})}
    replaced = apply_variant(net, variant, options, freq_select_stages)
    # last, as it may download
    loaded = load_backbone(net, initial) if initial else ''
    return Built(model, replaced, loaded, freeze(net, frozen_stages, frozen_bn))
