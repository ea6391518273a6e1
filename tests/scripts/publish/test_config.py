"""hub_configs/: a configuration for each model, the schema, and agreement with timm."""
import json
import re

import pytest
from safetensors import safe_open
from timm.models import get_pretrained_cfg

from scripts.publish.build import why_not
from scripts.publish.config import REDISTRIBUTABLE, ConfigError, parse_config, read_config
from tests.support.hub_config_cases import CONFIGS, DEFAULT, METRIC, ROOT, changed

pytestmark = pytest.mark.usefixtures('one_thread')


def test_there_is_a_configuration_for_each_model():
    wanted = {
        *(f'resnet{n}' for n in ('18', '34', '50', '101', '152', '50c', '50d')), 'resnext50_32x4d', 'wide_resnet50_2',
        *(f'convnext_{n}' for n in ('atto', 'femto', 'pico', 'nano', 'tiny', 'small', 'base')), 'convnextv2_tiny'}
    models = {path.name.removesuffix('.yaml') for path in CONFIGS}
    resnets = {base for base in wanted if not base.startswith('convnext')}
    wanted |= {f'dinat_{n}' for n in ('mini', 'tiny', 'small', 'base')}
    names = {f'{base}_fadc' for base in wanted} | {f'{base}{v}' for base in resnets for v in ('_dcn', '_dcn_fadc')}
    assert models == {f'{name}.{get_pretrained_cfg(name).tag}' for name in names} | {DEFAULT.stem}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configuration(path):
    config = read_config(path)
    cfg = get_pretrained_cfg(config.model)
    assert config.licence == cfg.license and config.repository.partition('/')[2] == config.model == path.stem
    assert config.repository.partition('/')[0] == 'fadc-timm'
    assert config.metrics and all(re.match(r'python -m scripts\.|.*://', m.source) for m in config.metrics)
    reason = why_not(config)
    if path == DEFAULT:
        assert reason is None and config.base is None
        with safe_open(cfg.file, 'pt') as f:
            measured = json.loads(f.metadata()['accuracy'])
        assert [m.value for m in config.metrics if m.of == 'model'] == [measured['top1']]
    else:
        assert config.base.repository == cfg.hf_hub_id and config.base.repository.startswith(('timm/', 'shi-labs/'))
        assert {m.of for m in config.metrics} == {'base'}
        # nobody had these weights at hand yet; some of their hashes are on the Hub's pages
        assert config.base.sha256 or not config.base.revision
        assert reason.startswith('expected_logits: null' if config.licence in REDISTRIBUTABLE else 'licence: ')
    assert ('Not for publication' in path.read_text()) == (config.licence not in REDISTRIBUTABLE)


BASE = dict(repository='timm/resnet18.a1_in1k', revision=None, sha256=None)


@pytest.mark.parametrize('values, problem', [
    (dict(model='resnet50'), "model: wanted <arch>_fadc.<tag> or <arch>_dcn.<tag>, got 'resnet50'"),
    (dict(repository='x'), "repository: wanted owner/name, got 'x'"),
    (dict(licence=...), 'licence: missing, wanted a text'),
    (dict(license='mit'), 'license: unknown, known are model, repository, '),
    (dict(made=' '), "made: wanted a text, got ' '"),
    (dict(datasets=[]), 'datasets: wanted a list of at least one name, got []'),
    (dict(datasets='imagenet-1k'), "datasets: wanted a list of at least one name, got 'imagenet-1k'"),
    (dict(metrics={}), 'metrics: wanted a list of mappings, got {}'),
    (dict(model_args=None), 'model_args: wanted a mapping, got None'),
    (dict(model_args=dict(ada_dr='no')), "model_args.ada_dr, which is sampling today, must be true or false"),
    (dict(expected_logits=[1, 'a']), "expected_logits: wanted a list of numbers or null, got [1, 'a']"),
    (dict(expected_logits=[True]), 'expected_logits: wanted a list of numbers or null, got [True]'),
    (dict(base='timm/x'), "base: wanted a mapping or null, got 'timm/x'"),
    (dict(base={**BASE, 'revision': 'main'}), "base.revision: wanted 40 hexadecimal digits (in quotes) or null, got"),
    (dict(base={**BASE, 'sha256': 12}), 'base.sha256: wanted 64 hexadecimal digits (in quotes) or null, got 12'),
    (dict(base={'repository': 'timm/x'}), 'base.revision: missing, wanted 40 hexadecimal digits'),
    (dict(metrics=[METRIC, {**METRIC, 'value': 101}]), 'metrics[1].value: wanted a number from 0 to 100, got 101'),
    (dict(metrics=[{**METRIC, 'of': 'us'}]), "metrics[0].of: wanted base, model or plain, got 'us'"),
    (dict(metrics=[{**METRIC, 'image_size': '224'}]), "metrics[0].image_size: wanted pixels, got '224'"),
    (dict(metrics=[{'name': 'top-1'}]), 'metrics[0].source: missing, wanted a text'),
    (dict(limits='few'), "limits: wanted a list of texts, got 'few'"),
    (dict(image='../x.jpg'), "image: wanted one of blue_marble.jpg, coffee.jpg, got '../x.jpg'"),
])
def test_schema(values, problem):
    with pytest.raises(ConfigError) as e:
        parse_config(changed(**values), 'x.yaml')
    assert any(line.startswith(f'x.yaml: {problem}') for line in str(e.value).splitlines()), e.value


def test_option_of_an_older_version():
    config = parse_config(changed(model_args=dict(ada_dr=False, bands=[2])), 'x.yaml')
    assert config.model_args == dict(sampling='fixed', bands=[2])


def test_schema_of_the_file():
    for text, message in ((': :', 'no YAML'), ('- 1', 'wanted a mapping, got [1]'), ('', 'wanted a mapping, got None'),
                          ('model: a\nmodel: b', 'the key model is there twice')):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_config(text, 'x.yaml')
    with pytest.raises(ConfigError) as e:  # all problems at once
        parse_config(changed(model=1, licence=2, extra=3), 'x.yaml')
    assert len(str(e.value).splitlines()) == 3


RESNET18 = ROOT / 'hub_configs' / 'resnet18_fadc.a1_in1k.yaml'


@pytest.mark.parametrize('path, values, problem', [
    (RESNET18, dict(licence='mit'), "licence: timm has 'apache-2.0', got 'mit'"),
    (RESNET18, dict(base={**BASE, 'repository': 'timm/resnet18.a2_in1k'}), "base: timm has 'timm/resnet18.a1_in1k'"),
    (RESNET18, dict(base=None), "base: timm has 'timm/resnet18.a1_in1k', got None"),
    (RESNET18, dict(datasets=['imagenet-1k', 'imagenet-22k']), "datasets: timm has ['imagenet-1k'], got"),
    (RESNET18, dict(repository='a/resnet50'), "repository: timm has 'resnet18_fadc.a1_in1k', got 'resnet50'"),
    (RESNET18, dict(made='trained anew'), "made: weights of a base are lifted, so it begins with 'base weights, "),
    (RESNET18, dict(metrics=[{**METRIC, 'image_size': 256}]), 'metrics[0].image_size: timm has [224, 288], got 256'),
    (RESNET18, dict(expected_logits=[1, 2]), 'expected_logits: their number: timm has 16, got 2'),
    (RESNET18, dict(model_args=dict(num_classes=3)), 'model_args: num_classes does not belong there'),
    (DEFAULT, dict(base=BASE), "base: timm has None, got 'timm/resnet18.a1_in1k'"),
    (DEFAULT, dict(metrics=[{**METRIC, 'image_size': 160}]), 'metrics[0].of: there is no base'),
])
def test_contradictions_to_timm(path, values, problem, tmp_path):
    file = tmp_path / path.name
    file.write_text(changed(path, **values))
    with pytest.raises(ConfigError) as e:
        read_config(file)
    assert problem in str(e.value), e.value


def test_names_of_configurations(tmp_path):
    (tmp_path / 'x.yaml').write_text(DEFAULT.read_text())
    with pytest.raises(ConfigError, match=f'the file of {DEFAULT.stem} is called {DEFAULT.stem}.yaml'):
        read_config(tmp_path / 'x.yaml')
    file = tmp_path / 'resnet18_fadc.nothing.yaml'
    file.write_text(changed(model='resnet18_fadc.nothing'))
    with pytest.raises(ConfigError, match='resnet18_fadc.nothing is no registered model with weights'):
        read_config(file)
