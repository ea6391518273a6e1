"""The model card: README.md of a published model, with the sections of timm's cards."""
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from huggingface_hub import ModelCardData
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .._writing import markdown_table
from ..models._family import Architecture, architecture_of, family_of
from ..models.cost import Cost, model_cost

__all__ = ['Base', 'Built', 'HubConfig', 'Metric', 'build_card', 'citation_chapter', 'usage']


class Base(NamedTuple):
    """Where the weights of the base come from.

    repository: Its name on the Hub, `owner/name`.
    revision: Commit, 40 hexadecimal digits. None if it is not known: then the newest commit is taken, and the card
        names it.
    sha256: Hash of the weights file, 64 hexadecimal digits; None if it is not known.
    """
    repository: str
    revision: Optional[str]
    sha256: Optional[str]


class Metric(NamedTuple):
    """A figure that somebody measured.

    name: For instance 'top-1'.
    value: In percent.
    dataset: The data that it was measured on.
    of: What was measured: 'base' (the base with its own weights), 'model' (the published model) or 'plain' (a plain
        base that was trained in the same way).
    image_size: Side of the input in pixels.
    source: Address or command that the figure comes from.
    """
    name: str
    value: float
    dataset: str
    of: str
    image_size: int
    source: str


class HubConfig(NamedTuple):
    """A model to publish.

    model: Name and tag as registered with timm, such as `<base>_fadc.<tag>`; also the name of the configuration file.
    repository: Our repository on the Hub, `owner/name`; the name is the model's.
    base: The base whose weights are lifted; None for the package's own weights.
    made: How the model was made, in one sentence. For lifted weights it begins with 'base weights, identity FADC'.
    licence: As in timm's pretrained_cfg.
    datasets: The data sets that the model was trained on, by their names on the Hub.
    metrics: Figures and their sources.
    model_args: Arguments of `timm.create_model` that differ from the defaults.
    expected_logits: The logits of the fixed input, see :func:`fadc_timm.checkpoints.fixed_logits`; None until the model
        was built once with its weights.
    limits: What a user has to know before relying on it, a sentence or two each.
    image: The picture of the card's example, a file in `fadc_timm/data`.
    """
    model: str
    repository: str
    base: Optional[Base]
    made: str
    licence: str
    datasets: Tuple[str, ...]
    metrics: Tuple[Metric, ...]
    model_args: Dict[str, Any]
    expected_logits: Optional[Tuple[float, ...]]
    limits: Tuple[str, ...] = ()
    image: str = 'coffee.jpg'


class Built(NamedTuple):
    """A model and what its building found out.

    model: The model, in eval mode.
    logits: (num_classes,), the logits of the fixed input.
    base: Where the weights come from, with the revision and hash that were found; None without a base.
    error: Relative error of the logits against the base's; None without a base.
    """
    model: nn.Module
    logits: Tensor
    base: Optional[Base]
    error: Optional[float]


_TIMM = '''@misc{rw2019timm,
  author       = {Ross Wightman},
  title        = {PyTorch Image Models},
  year         = {2019},
  publisher    = {GitHub},
  doi          = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}'''

_OPEN = '''from pathlib import Path

import timm
import torch
from PIL import Image

import fadc_timm

image = Image.open(Path(fadc_timm.__file__).parent / 'data' / '{image}').convert('RGB')  # or any other
'''
# for images of other than three channels, which no picture of the package has
_RANDOM = '''import timm
import torch

import fadc_timm

x = torch.randn({shape})  # or images, normalised as config.json says
'''
_TRANSFORM = '''transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
'''
_CLASSES = '''model = timm.create_model('hf-hub:{repository}', pretrained=True).eval()
{transform}
with torch.inference_mode():
    probabilities = model({x}).softmax(dim=1)  # (1, {num_classes})
top_probabilities, top_classes = probabilities.topk({top})
'''
_MAPS = '''backbone = timm.create_model('hf-hub:{repository}', pretrained=True, features_only=True).eval()

with torch.inference_mode():
    features = backbone({x})
for feature in features:
    print(tuple(feature.shape))
{shapes}
'''
_EMBEDDINGS = '''model = timm.create_model('hf-hub:{repository}', pretrained=True, num_classes=0).eval()
{transform}
with torch.inference_mode():
    embedding = model({x})  # {embedding}
    # or, before pooling
    unpooled = model.forward_features({x})  # {unpooled}
'''


def usage(repository: str, num_classes: int, input_size: Tuple[int, ...], embedding: str, unpooled: str,
          shapes: Optional[str], image: str = 'coffee.jpg') -> str:
    """The chapter on the usage, whose code runs as it stands.

    Args:
        repository: `owner/name`.
        num_classes: Number of classes; without any there is no section on classification.
        input_size: (C, H, W).
        embedding: Shape of the pooled features, as a text.
        unpooled: Shape of the features before pooling.
        shapes: A comment with the shape of each feature map; None for a network without feature maps.
        image: The picture, a file in `fadc_timm/data`.
    """
    sections = [('Image Embeddings', _EMBEDDINGS)]
    if shapes is not None:
        sections.insert(0 if num_classes else 1, ('Feature Map Extraction', _MAPS))
    if num_classes:
        sections.insert(0, ('Image Classification', _CLASSES))
    opens, transform, x = _OPEN, _TRANSFORM, 'transform(image).unsqueeze(0)'
    if input_size[0] != 3:
        opens, transform, x = _RANDOM, '', 'x'
    values = dict(repository=repository, num_classes=num_classes, top=min(5, num_classes), embedding=embedding,
                  unpooled=unpooled, shapes=shapes, image=image, x=x, shape=', '.join(map(str, (1, *input_size))))
    text = ('## Model Usage\n\n'
            'The architecture is not part of timm: `import fadc_timm` (package `fadc-timm`) registers it.\n')
    for i, (title, code) in enumerate(sections):
        code = code.replace('{transform}\n', '\n' if i else f'{transform}\n')
        code = code if i else f'{opens}\n{code}'
        for name, value in values.items():
            code = code.replace('{' + name + '}', str(value))
        text += f'\n### {title}\n```python\n{code}```\n'
    return text.rstrip()


def citation_chapter(*entries: str) -> str:
    """The chapter with BibTeX entries, and timm's behind them."""
    return '## Citation\n' + '\n'.join(f'```bibtex\n{c}\n```' for c in (*entries, _TIMM))


def _registered(config: HubConfig) -> Architecture:
    arch = architecture_of(config.model)
    if arch is None:
        raise ValueError(f'{config.model} is no FADC model of this package; they are listed by: fadc-timm list')
    return arch


def _front_matter(config: HubConfig) -> str:
    data = ModelCardData(
        license=config.licence,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', *_registered(config).variant.tags],
        datasets=list(config.datasets),
        base_model=config.base.repository if config.base else None)
    return f'---\n{data.to_yaml()}\n---'


def _figure(metrics: List[Metric], of: str) -> str:
    return ', '.join(f'{m.value:.2f} ({m.image_size} px)' for m in metrics if m.of == of)


def _comparison(config: HubConfig, cost: Cost, base_cost: Cost, error: Optional[float]) -> str:
    arch = config.model.partition('.')[0]
    names = sorted({m.name for m in config.metrics})
    theirs = 'base' if config.base else 'plain'
    header = ['model', 'M params', 'GMACs', 'M activations', *(f'{name} [%]' for name in names)]
    rows = []
    for name, c, of in ((_registered(config).base, base_cost, theirs), (arch, cost, 'model')):
        rows.append([f'`{name}`', f'{c.params:.2f}', f'{c.gmacs:.2f}', f'{c.activations:.2f}', *(
            _figure([m for m in config.metrics if m.name == n], of) or 'not measured' for n in names)])
    text = markdown_table(header, rows)
    if error is not None:
        text += (
            '\n\nThe layers are at their identity, where they compute what the layers did that they stand '
            f"for: on a fixed input the logits are the base's with a relative error of {error:.1e}. The figures of the "
            'base are as published, and were not measured again with them. The layers are there to be trained.')
    elif config.metrics:
        text += f'\n\n`{_registered(config).base}` is the plain network, trained in the same way.'
    sources = sorted({f'{m.dataset}: {m.source}' for m in config.metrics})
    return text + '\n\nSources of the figures:\n' + '\n'.join(f'- {s}' for s in sources) if sources else text


def _details(config: HubConfig, built: Built, cost: Cost, cfg: Dict[str, Any]) -> str:
    size = cfg['input_size'][-2:]
    lines = [
        '- **Model Type:** Image classification / feature backbone',
        '- **Model Stats:**',
        f'  - Params (M): {cost.params:.2f}',
        f'  - GMACs: {cost.gmacs:.2f}',
        f'  - Activations (M): {cost.activations:.2f}',
        f'  - Image size: {size[0]} x {size[1]}',
        '- **Papers:**',
        *(f'  - {paper.title}: {paper.address}' for paper in _registered(config).variant.papers),
    ]
    papers = cfg.get('paper_ids') or ()
    papers = [papers] if isinstance(papers, str) else papers
    lines += [f'  - of the base: https://arxiv.org/abs/{p.partition(":")[2]}' for p in papers]
    lines += ['- **Dataset:** ' + ', '.join(config.datasets)]
    if cfg.get('origin_url'):
        lines += [f'- **Original:** {cfg["origin_url"]}']
    lines += [f'- **How it was made:** {config.made}']
    if built.base:
        lines += [
            f'  - Base weights: https://huggingface.co/{built.base.repository}, revision `{built.base.revision}`',
            f'  - SHA-256 of their file: `{built.base.sha256}`']
    if config.model_args:
        lines += [f'- **Arguments:** `{config.model_args}`']
    labels = cfg.get('label_names')
    if labels:
        lines += ['- **Classes:** ' + '; '.join(labels)]
    return '\n'.join(lines)


def build_card(config: HubConfig, built: Built) -> str:
    """The card of a model, as the text of README.md.

    Args:
        config: What is published.
        built: The model. Parameters, GMACs, activations and the shapes of feature maps are for its input size.
    """
    arch = config.model.partition('.')[0]
    base, variant = _registered(config).base, _registered(config).variant
    registered = get_pretrained_cfg(config.model)
    assert registered is not None
    cfg = registered.to_dict()
    size = tuple(cfg['input_size'])
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in config.model_args.items()}
    cost = model_cost(arch, cfg['num_classes'], size, **args)
    base_cost = model_cost(base, cfg['num_classes'], size)
    family = family_of(built.model)
    info: Any = built.model.feature_info
    infos = info if isinstance(info, list) else info.get_dicts()
    shapes = '\n'.join(
        f'# (1, {f["num_chs"]}, {-(-size[1] // f["reduction"])}, {-(-size[2] // f["reduction"])})' for f in infos)
    features = built.model.num_features
    return '\n\n'.join([
        f'{_front_matter(config)}\n# Model card for {config.model}',
        f'`{base}` with {variant.name} {family.place} of its stages 2 to 4: '
        f'{variant.effect}. How it was made: {config.made}.',
        f'## Model Details\n{_details(config, built, cost, cfg)}',
        *(['## Limits\n' + '\n'.join(f'- {limit}' for limit in config.limits)] if config.limits else []),
        usage(config.repository, cfg['num_classes'], size, f'(1, {features})', f'(1, {features}, H, W)', shapes,
              config.image),
        f'## Model Comparison\n{_comparison(config, cost, base_cost, built.error)}',
        citation_chapter(*(paper.citation for paper in variant.papers), family.citation),
    ]) + '\n'
