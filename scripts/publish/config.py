"""What we publish: one YAML file a model, `hub_configs/<arch>.<tag>.yaml`, its schema and its check against timm.

PyYAML is required by both timm and huggingface_hub.
"""
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import yaml
from timm.models import PretrainedCfg, get_pretrained_cfg

import fadc_timm
from fadc_timm.hub import Base, HubConfig, Metric
from fadc_timm.layers.fad_conv import read_options

__all__ = ['ConfigError', 'REDISTRIBUTABLE', 'check_config', 'parse_config', 'read_config']

# Licences, by their names on the Hub, that grant redistribution, also of modified weights and for any use.
REDISTRIBUTABLE = frozenset(('apache-2.0', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'mit'))

IDENTITY = 'base weights, identity '
IMAGES = sorted(path.name for path in (Path(fadc_timm.__file__).parent / 'data').glob('*.jpg'))


class ConfigError(ValueError):
    """A configuration that is malformed, or that says something else than timm; a line for each problem."""


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys; here it is an error."""


def _unique_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = sorted({str(k) for k in keys if keys.count(k) > 1})
    if twice:
        raise yaml.MarkedYAMLError(None, None, f'the key {", ".join(twice)} is there twice', node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)

Check = Callable[[Any], bool]


def _text(pattern: str = r'(?s).*\S.*') -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, least: int = 0) -> Check:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


_REPOSITORY = _text(r'[\w.-]+/[\w.-]+'), 'owner/name'
_MAPPING = (lambda value: isinstance(value, dict)), 'a mapping'
_SENTENCE = _text(), 'a text'

# Each key, what it may hold, and what to say that it should.
_SCHEMA: dict[str, tuple[Check, str]] = {
    'model': (_text(r'\w+_(fadc|dcn)\.\w+'), '<arch>_fadc.<tag> or <arch>_dcn.<tag>'),
    'repository': _REPOSITORY,
    'base': (_optional(_MAPPING[0]), 'a mapping or null'),
    'made': _SENTENCE,
    'licence': _SENTENCE,
    'datasets': (_list_of(_text(r'[\w./-]+'), 1), 'a list of at least one name'),
    'metrics': (_list_of(_MAPPING[0]), 'a list of mappings'),
    'model_args': _MAPPING,
    'expected_logits': (_optional(_list_of(_number, 1)), 'a list of numbers or null'),
    'limits': (_list_of(_SENTENCE[0]), 'a list of texts'),
    'image': ((lambda value: isinstance(value, str) and value in IMAGES), f'one of {", ".join(IMAGES)}'),
}
_BASE: dict[str, tuple[Check, str]] = {
    'repository': _REPOSITORY,
    'revision': (_optional(_text('[0-9a-f]{40}')), '40 hexadecimal digits (in quotes) or null'),
    'sha256': (_optional(_text('[0-9a-f]{64}')), '64 hexadecimal digits (in quotes) or null'),
}
_METRIC: dict[str, tuple[Check, str]] = {
    'name': _SENTENCE,
    'value': ((lambda value: _number(value) and 0 <= value <= 100), 'a number from 0 to 100'),
    'dataset': _SENTENCE,
    'of': (_text('base|model|plain'), 'base, model or plain'),
    'image_size': ((lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0), 'pixels'),
    'source': _SENTENCE,
}


def _problems(content: Any, schema: dict[str, tuple[Check, str]], where: str = '') -> list[str]:
    """What is wrong with a mapping, key by key."""
    if not isinstance(content, dict):
        return [f'{where or "the file"}: wanted a mapping, got {content!r}']
    prefix = f'{where}.' if where else ''
    problems = [f'{prefix}{key}: missing, wanted {want}' for key, (_, want) in schema.items() if key not in content]
    problems += [f'{prefix}{key}: unknown, known are {", ".join(schema)}' for key in content if key not in schema]
    problems += [
        f'{prefix}{key}: wanted {want}, got {content[key]!r}'
        for key, (check, want) in schema.items() if key in content and not check(content[key])]
    return problems


def _refuse(name: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError('\n'.join(f'{name}: {problem}' for problem in problems))


def parse_config(text: str, name: str) -> HubConfig:
    """The configuration in a YAML text.

    Args:
        text: The file's content.
        name: What errors call it.

    Raises:
        ConfigError: It is not what the schema wants: every problem with the key, what it has and what is wanted.
    """
    try:
        content = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as e:
        raise ConfigError(f'{name}: no YAML: {" ".join(str(e).split())}') from None
    if isinstance(content, dict):
        content = {'limits': [], 'image': HubConfig._field_defaults['image'], **content}  # the two that may be left out
    problems = _problems(content, _SCHEMA)
    _refuse(name, problems)
    base, metrics = content['base'], content['metrics']
    try:
        content['model_args'] = read_options(content['model_args'])
    except ValueError as e:
        problems.append(f'model_args.{e}')
    if base is not None:
        problems += _problems(base, _BASE, 'base')
    for i, metric in enumerate(metrics):
        problems += _problems(metric, _METRIC, f'metrics[{i}]')
    _refuse(name, problems)
    logits = content['expected_logits']
    return HubConfig(**{
        **content,
        'base': None if base is None else Base(**base),
        'datasets': tuple(content['datasets']),
        'metrics': tuple(Metric(**metric) for metric in metrics),
        'limits': tuple(content['limits']),
        'expected_logits': None if logits is None else tuple(map(float, logits)),
    })


def read_config(path: str | Path) -> HubConfig:
    """Read and check a file, see :func:`parse_config` and :func:`check_config`.

    Raises:
        ConfigError: It is malformed, is not named after its model, or contradicts timm.
        OSError: It cannot be read.
    """
    path = Path(path)
    config = parse_config(path.read_text(encoding='utf-8'), str(path))
    if path.name != f'{config.model}.yaml':
        raise ConfigError(f'{path}: model: the file of {config.model} is called {config.model}.yaml')
    check_config(config, str(path))
    return config


def _trained_on(tag: str) -> list[str]:
    """ImageNet's subsets that a tag of timm names: its parts end with them, such as `fb_in22k_ft_in1k_384`."""
    return sorted({f'imagenet-{n}k' for n in re.findall(r'in(\d+)k', tag)})


def check_config(config: HubConfig, name: str) -> PretrainedCfg:
    """Compare a configuration with the registry, in which timm's own tags, licences and Hub ids stand.

    Args:
        config: The configuration.
        name: What errors call it.

    Returns:
        timm's configuration of the same tag.

    Raises:
        ConfigError: With a line for each contradiction.
    """
    arch, _, tag = config.model.partition('.')
    cfg = get_pretrained_cfg(config.model, allow_unregistered=False) if config.model in timm.list_pretrained() else None
    if cfg is None:
        raise ConfigError(f'{name}: model: {config.model} is no registered model with weights')
    problems = []

    def compare(key: str, given: Any, wanted: Any) -> None:
        if given != wanted:
            problems.append(f'{key}: timm has {wanted!r}, got {given!r}')

    compare('repository', config.repository.partition('/')[2], config.model)
    compare('licence', config.licence, cfg.license)
    compare('base', None if config.base is None else config.base.repository, cfg.hf_hub_id)
    if config.base is not None:
        compare('datasets', sorted(config.datasets), _trained_on(tag))
        if not config.made.startswith(IDENTITY):
            problems.append(f'made: weights of a base are lifted, so it begins with {IDENTITY!r}; got {config.made!r}')
    sizes = {size[-1] for size in (cfg.input_size, cfg.test_input_size) if size}
    for i, metric in enumerate(config.metrics):
        if metric.image_size not in sizes:
            problems.append(f'metrics[{i}].image_size: timm has {sorted(sizes)}, got {metric.image_size}')
        if metric.of == 'base' and config.base is None:
            problems.append(f'metrics[{i}].of: there is no base')
    stated = {'num_classes', 'in_chans', 'pretrained', 'features_only'} & set(config.model_args)
    if stated:
        problems.append(f'model_args: {", ".join(sorted(stated))} does not belong there')
    logits = config.expected_logits
    if logits is not None:
        compare('expected_logits: their number', len(logits), min(cfg.num_classes, 16))
    _refuse(name, problems)
    return cfg
