"""Decoders of segmentation_models_pytorch over timm's backbones and their FADC variants."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scripts.training.variants import apply_variant, split_name
from scripts.training.weights import find_init, load_backbone

# Argument for the width of each decoder.
_WIDTHS: dict[str, Callable[[int], dict[str, Any]]] = {
    **{name: lambda c: {'decoder_channels': c} for name in ('upernet', 'deeplabv3', 'deeplabv3plus', 'pan')},
    **{name: lambda c: {'decoder_channels': tuple(max(c >> i, 4) for i in range(5))}
       for name in ('unet', 'unetplusplus', 'manet')},
    # its GroupNorm has 32 groups
    'fpn': lambda c: {'decoder_pyramid_channels': c, 'decoder_segmentation_channels': max(c // 64 * 32, 32)},
    'segformer': lambda c: {'decoder_segmentation_channels': c},
    'pspnet': lambda c: {'psp_out_channels': c},
}
_SETS_STRIDE = ('deeplabv3', 'deeplabv3plus', 'pan')  # decoders that have an argument of their own for it


@dataclass(frozen=True)
class Built:
    """A network for segmentation.

    model: Maps (B, 3, H, W) to logits (B, classes, H, W), sides multiples of 32.
    replaced: Convolutions of the backbone that its variant replaced, as named in the backbone.
    loaded: What was loaded into the backbone, and from where, in words.
    """
    model: nn.Module
    replaced: list[str]
    loaded: str


def import_smp() -> Any:
    """segmentation_models_pytorch, or an error that says how to get it."""
    try:
        import segmentation_models_pytorch
    except ImportError as e:
        raise ImportError("Segmentation needs segmentation_models_pytorch: pip install -e '.[segmentation]'") from e
    return segmentation_models_pytorch


def build(
        backbone: str,
        classes: int,
        variant: str = 'plain',
        decoder: str = 'upernet',
        decoder_channels: int | None = None,
        output_stride: int = 32,
        init: str = '',
        fadc: dict[str, Any] | None = None,
        freq_select_stages: Sequence[int] = (2, 3, 4),
        backbone_args: dict[str, Any] | None = None,
        seed: int = 0,
) -> Built:
    """Build a network. Variants of one seed have the same weights in the backbone, and the same decoder, at the start.

    Args:
        backbone: timm's name, or that of one of our models.
        classes: Number of classes.
        variant: Variant of the backbone.
        decoder: A decoder of segmentation_models_pytorch, in lower case.
        decoder_channels: Its width, None for its own.
        output_stride: Of the backbone, 32, 16 or 8.
        init: Tag of timm's weights or `default`, path of a checkpoint, or nothing for random weights.
        fadc: Options of FADConv2d beyond the variant's.
        freq_select_stages: Stages with FreqSelect, where the variant has it.
        backbone_args: More arguments of `timm.create_model`, as `drop_path_rate`.
        seed: Of the random weights.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        ValueError: A name or value that there is not; the message names it.
        RuntimeError: The checkpoint does not fit.
    """
    smp = import_smp()
    base, variant = split_name(backbone, variant)
    if decoder not in smp.MODEL_ARCHITECTURES_MAPPING:
        raise ValueError(f'There is no decoder {decoder!r}: the decoders are '
                         f'{", ".join(smp.MODEL_ARCHITECTURES_MAPPING)}.')
    initial = find_init(base, init, variant, dict(fadc or {})) if init else None
    kwargs: dict[str, Any] = dict(backbone_args or {})
    if decoder_channels is not None:
        if decoder not in _WIDTHS:
            raise ValueError(f'decoder_channels is for {", ".join(sorted(_WIDTHS))}, not for {decoder!r}')
        kwargs.update(_WIDTHS[decoder](decoder_channels))
    if output_stride != 32:
        kwargs['encoder_output_stride' if decoder in _SETS_STRIDE else 'output_stride'] = output_stride
    torch.manual_seed(seed)
    model = smp.create_model(decoder, f'tu-{base}', encoder_weights=None, classes=classes, **kwargs)
    net = model.encoder.model
    options = {**(initial.options if initial else {}), **(fadc or {})}
    replaced = apply_variant(net, variant, options, freq_select_stages)
    # last, as it may download
    loaded = load_backbone(net, initial) if initial else ''
    return Built(model, replaced, loaded)


class Auxiliary(nn.Sequential):
    """FCN head on the feature map at stride 16, for an auxiliary loss in training, as UPerNet is trained with."""

    def __init__(self, in_channels: int, channels: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1))

    @classmethod
    def for_model(cls, model: nn.Module, channels: int, classes: int, seed: int) -> 'Auxiliary':
        """The head for a model of `build`; its random weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width: Any = model.get_submodule('encoder').out_channels
            return cls(width[-2], channels, classes)
