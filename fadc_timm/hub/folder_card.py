"""The model card of a folder that `fadc_timm.save` or `fadc-timm convert` wrote: what anybody publishes."""
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import is_model_in_modules
from torch import Tensor, nn

from ..checkpoints import load
from ..layers import FADConv2d, FADNeighborhoodAttention
from ..models._family import DCN, DCN_FADC, FADC, FADC_ATTENTION, Variant, architecture_of, family_of
from ..models.cost import module_cost
from ..models.lifted import lifted_layers
from .card import citation_chapter, usage

__all__ = ['folder_card']


def _shape(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def _feature_shapes(folder: Union[str, Path], x: Tensor) -> Optional[str]:
    """A comment with the shapes of the feature maps, or None for a network of which timm makes none."""
    try:
        backbone = load(folder, features_only=True).eval()
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        return None
    return '\n'.join(f'# {_shape(feature)}' for feature in backbone(x))


def _layers(model: nn.Module) -> List[str]:
    """A line for each group of FADC layers with the same options."""
    lines = []
    for group in lifted_layers(model):
        options = ', '.join(f'`{name}={value!r}`' for name, value in group['options'].items())
        names = group['layers']
        lines.append(f'  - {len(names)} layers, from `{names[0]}` to `{names[-1]}`: {options}')
    return lines


def _of_base(model: nn.Module) -> Tuple[str, ...]:
    """The BibTeX entry of the base's paper; none of a lifted network, whose papers are not known."""
    try:
        return (family_of(model).citation,)
    except ValueError:
        return ()


def _variant_of(model: nn.Module) -> Variant:
    """What was lifted into a network, by its layers, whose options need not be those that its name stands for."""
    convs = [m for m in model.modules() if isinstance(m, FADConv2d)]
    if not convs:
        return FADC_ATTENTION
    parts = {'AdaKern': 'ada_kern', 'FreqSelect': 'freq_select'}
    names = [name for name, part in parts.items() if any(getattr(m, part) is not None for m in convs)]
    with_parts = f"FADC's {' and '.join(names) or 'layers'}"
    if all(m.sampling == 'deform' for m in convs):
        variant = DCN_FADC._replace(name=f'{DCN.name} with {with_parts}') if names else DCN
        if any(m.free_offsets is not None and m.free_offsets.modulated for m in convs):
            return variant
        return variant._replace(
            name=variant.name.replace(DCN.name, 'deformable convolution (DCNv1)'),
            effect=variant.effect.replace(' and a weight', ''))
    if any(m.sampling == 'dilation' for m in convs):
        return FADC
    return FADC._replace(
        name=f'convolutions under {with_parts}', effect='layers that adapt to the image at a fixed dilation')


@torch.no_grad()
def folder_card(
        folder: Union[str, Path],
        repository: str,
        *,
        licence: str,
        datasets: Sequence[str] = (),
        base_model: Optional[str] = None,
        about: str = '',
) -> str:
    """The card of the model in a folder, as the text of README.md.

    Parameters, GMACs and shapes are those of one image of the model's input size, which is computed.

    Args:
        folder: The folder of a model.
        repository: `owner/name`, where it will be published.
        licence: Of the weights, by its name on the Hub.
        datasets: What the model was trained on, by the names on the Hub.
        base_model: The repository of the weights that it was made of.
        about: Markdown on how it was trained and what it gets; it follows the title.

    Raises:
        OSError: There is no such folder.
        RuntimeError: The weights do not fit the model.
    """
    model = load(folder).eval()
    cfg: Any = model.pretrained_cfg
    arch = architecture_of(cfg['architecture'])
    attends = any(isinstance(m, FADNeighborhoodAttention) for m in model.modules())
    base, variant = cfg['architecture'] if arch is None else arch.base, _variant_of(model)
    kind = 'neighbourhood attention' if variant is FADC_ATTENTION else 'convolutions'
    owner = 'fadc_timm' if is_model_in_modules(base, ['dinat']) else f'timm {timm.__version__}'
    size = timm.data.resolve_model_data_config(model)['input_size']
    x = torch.zeros(1, *size)
    num_classes = int(getattr(model, 'num_classes', 0))
    cost = module_cost(model, size, 'cpu')
    embedding: Any = load(folder, num_classes=0).eval()
    task = 'image-classification' if num_classes else 'image-feature-extraction'
    data = ModelCardData(
        license=licence, library_name='timm', pipeline_tag=task, base_model=base_model, datasets=list(datasets) or None,
        tags=[task, 'timm', 'transformers', *variant.tags])
    details = [
        f'- **Network:** `{base}` of {owner}; replaced {kind}:',
        *_layers(model),
        f'- **Params (M):** {cost.params:.2f}',
        f'- **GMACs:** {cost.gmacs:.2f}',
        f'- **Input:** {" x ".join(map(str, size))}, mean {tuple(cfg["mean"])}, std {tuple(cfg["std"])}',
        f'- **Licence of the weights:** {licence}']
    if datasets:
        details.append(f'- **Dataset:** {", ".join(datasets)}')
    if base_model:
        details.append(f'- **Made of:** https://huggingface.co/{base_model}')
    if cfg.get('origin_url'):
        details.append(f'- **Original weights of the base:** {cfg["origin_url"]}')
    if cfg.get('label_names'):
        details.append(f'- **Classes:** {"; ".join(cfg["label_names"])}')
    details += [f'- **Paper:** {paper.title}: {paper.address}' for paper in variant.papers]
    title = f'---\n{data.to_yaml()}\n---\n# Model card for {repository.rpartition("/")[2]}'
    summary = f'`{base}` with {variant.name} in {"" if attends else "place of "}some of its {kind}: {variant.effect}.'
    return '\n\n'.join([
        title, summary, *([about.strip()] if about.strip() else []),
        '## Model Details\n' + '\n'.join(details),
        usage(repository, num_classes, size, _shape(embedding(x)), _shape(embedding.forward_features(x)),
              _feature_shapes(folder, x)),
        citation_chapter(*(paper.citation for paper in variant.papers), *_of_base(model)),
    ]) + '\n'
