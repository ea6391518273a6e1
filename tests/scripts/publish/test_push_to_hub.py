"""Model cards and push_to_hub.py, through the Hub's real client against a server on this machine."""
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from fadc_timm.models.cost import model_cost
from scripts.publish.build import LOSSLESS as BUILD_LOSSLESS
from tests.support.backbones import LOSSLESS, photos, trained
from tests.support.cases import error
from tests.support.hub_client import execute, load, script
from tests.support.hub_config_cases import CONFIGS, DEFAULT, METRIC, ROOT, changed
from tests.support.hub_server import TOKEN, oid_of

PUSH = 'scripts.publish.push_to_hub'
OURS = 'fadc-timm/test_resnet_fadc.bluemarble_climate'
FILES = ['README.md', 'config.json', 'model.safetensors']

pytestmark = pytest.mark.usefixtures('one_thread')


# publishing


@pytest.fixture
def push(client, hub):
    def call(*args, token=TOKEN):
        run = client.call(script, PUSH, *map(str, args), token=token)
        assert TOKEN not in run['out'], 'the token is in what the script says, or in a log'
        return run['status'], run['out']
    return call


def posts(hub):
    return [r['path'] for r in hub.log if r['method'] in ('POST', 'PUT') and r['path'] != '/api/validate-yaml']


def test_dry_run(hub, push, tmp_path):
    status, out = push(DEFAULT, '--out', tmp_path)
    assert status == 0, out
    assert 'loaded again: the expected logits came out' in out and 'nothing was sent: without --push' in out
    assert hub.log == [] or posts(hub) == []
    folder = tmp_path / DEFAULT.stem
    assert sorted(p.name for p in folder.iterdir()) == FILES
    for path in folder.iterdir():
        assert f'{path.name}: {path.stat().st_size} bytes' in out
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet_fadc' and config['num_classes'] == 6
    assert config['label_names'][0] == 'ocean'
    assert 'num_classes' not in {**config.get('model_args', {}), **config['pretrained_cfg']}
    assert not {'file', 'url', 'hf_hub_id', 'source'} & set(config['pretrained_cfg'])
    assert not any(str(ROOT) in p.read_text(errors='replace') for p in folder.iterdir())
    with safe_open(folder / 'model.safetensors', 'pt') as f:
        assert f.metadata() == {'format': 'pt'}


def test_push(hub, push, client, home, tmp_path):
    """One commit; a second push changes nothing, and never a card that somebody edited, unless told to."""
    status, out = push(DEFAULT, '--push', '--out', tmp_path)
    assert status == 0, out
    repo, folder = hub.repos[OURS], tmp_path / DEFAULT.stem
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert {k: v for k, v in repo.files.items() if k != '.gitattributes'} == {
        p.name: p.read_bytes() for p in folder.iterdir()}
    assert f'pushed README.md, config.json, model.safetensors: {hub.endpoint}/{OURS}/commit/{repo.main}' in out

    x = photos(160).numpy()
    published = client.call(load, f'hf-hub:{OURS}', x, str(tmp_path / 'cache'))
    packaged = client.call(load, DEFAULT.stem, x)
    assert published['error'] is None and (published['y'] == packaged['y']).all()

    assert push(DEFAULT, '--push')[0] == 0 and len(repo.commits) == 2
    edited = repo.files['README.md'] + b'\nEdited by hand.\n'
    repo.commit({**repo.files, 'README.md': edited, 'pytorch_model.bin': b'old'})
    status, out = push(DEFAULT, '--push')
    assert status == 0 and repo.files['README.md'] == edited and len(repo.commits) == 3
    assert '--update-card replaces it' in out and 'the repository also has: pytorch_model.bin' in out
    status, out = push(DEFAULT, '--push', '--update-card')
    assert status == 0 and repo.files['README.md'] == (folder / 'README.md').read_bytes() and len(repo.commits) == 4
    for path in (*home.rglob('*'), *tmp_path.rglob('*')):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_push_under_another_owner(hub, push, tmp_path):
    status, out = push(DEFAULT, '--push', '--org', 'somebody', '--out', tmp_path)
    assert status == 0 and list(hub.repos) == [f'somebody/{DEFAULT.stem}']
    card = (tmp_path / DEFAULT.stem / 'README.md').read_text()
    assert f"'hf-hub:somebody/{DEFAULT.stem}'" in card and 'fadc-timm/' not in card


def test_push_without_a_token(hub, push):
    status, out = push(DEFAULT, '--push', token=None)
    assert status == 1 and '401' in out and OURS not in hub.repos


def test_push_that_another_one_overtakes(hub, push):
    """The commit names its parent, so what came between is not overwritten unseen."""
    assert push(DEFAULT, '--push')[0] == 0
    repo = hub.repos[OURS]
    files = {**repo.files, 'README.md': b'theirs', 'config.json': b'theirs'}
    repo.commit({**repo.files, 'config.json': b'old'})
    hub.faults['commit'] = lambda handler, _: repo.commit(files) == ''
    status, out = push(DEFAULT, '--push')
    assert status == 1 and '412' in out and repo.files == files


@pytest.mark.parametrize('step', ['lfs', 'commit'])
@pytest.mark.parametrize('before', [None, {'README.md': b'old', 'config.json': b'old', 'model.safetensors': b'old'}])
def test_push_that_the_hub_refuses(hub, push, step, before):
    if before:
        hub.add(OURS, before)
    hub.faults[step] = lambda handler, _: handler.error(403, 'No') or True
    status, out = push(DEFAULT, '--push', '--update-card')
    assert status == 1 and '403' in out
    assert hub.repos[OURS].files == (before or {'.gitattributes': b'*.safetensors filter=lfs\n'})
    hub.faults.clear()
    assert push(DEFAULT, '--push', '--update-card')[0] == 0
    files = hub.repos[OURS].files
    assert {*FILES} <= {*files} and b'old' not in files.values()


@pytest.mark.parametrize('step', [pytest.param('lfs', marks=pytest.mark.sweep), 'commit'])
def test_push_that_is_killed(hub, push, step, tmp_path):
    """While it uploads, or as it asks for the commit: nothing is half-published, and the next push completes it."""
    hub.add(OURS, {'config.json': b'old'})
    run = subprocess.Popen(
        [sys.executable, '-m', PUSH, DEFAULT, '--push'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env={**os.environ, 'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path), 'HF_TOKEN': TOKEN,
             'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})

    def kill(handler, _):
        run.kill()
        run.wait()
        handler.close_connection = True
        return True

    hub.faults[step] = kill
    out = run.communicate(timeout=300)[0]
    assert run.returncode == -9, out
    assert hub.repos[OURS].files == {'config.json': b'old'} and TOKEN not in out
    hub.faults.clear()
    assert push(DEFAULT, '--push')[0] == 0
    assert sorted(hub.repos[OURS].files) == FILES


# weights of a base


LIFTED = 'test_resnet_fadc.r160_in1k'


@pytest.fixture
def lifted(hub, tmp_path):
    """A configuration of weights that are lifted from the Hub, and those weights."""
    content = safetensors.torch.save({k: v.contiguous() for k, v in trained('test_resnet').items()})
    base = hub.add('timm/test_resnet.r160_in1k', {'model.safetensors': content})

    def write(**values):
        file = tmp_path / f'{LIFTED}.yaml'
        defaults = dict(
            model=LIFTED, repository=f'fadc-timm/{LIFTED}', datasets=['imagenet-1k'],
            base=dict(repository='timm/test_resnet.r160_in1k', revision=None, sha256=None),
            made='base weights, identity FADC', expected_logits=None,
            metrics=[{**METRIC, 'value': 41.23, 'image_size': 160, 'source': 'https://example.org'}])
        file.write_text(changed(**{**defaults, **values}))
        return file

    write.base, write.content = base, content
    return write


def test_lifted_weights(hub, push, client, lifted, tmp_path):
    """From logits that nobody knows to a published model that computes what its base does."""
    status, out = push(lifted(), '--push')
    assert status == 1 and 'expected_logits: null' in out and 'Without --push they are printed' in out
    assert not hub.requests('GET', 'resolve|cdn')  # refused before a download
    (tmp_path / 'taken' / LIFTED).mkdir(parents=True)
    (tmp_path / 'taken' / LIFTED / 'notes.txt').write_text('mine')
    status, out = push(lifted(), '--out', tmp_path / 'taken')
    assert status == 1 and 'is no folder of a model' in out and not hub.requests('GET', 'resolve|cdn')
    status, out = push(lifted())
    assert status == 1 and 'expected_logits: null' in out and f'fadc-timm/{LIFTED}' not in hub.repos
    logits = json.loads(re.search(r'^expected_logits: (.*)$', out, re.M)[1])
    assert len(logits) == 16
    status, out = push(lifted(expected_logits=[v + 0.1 for v in logits]), '--push')
    assert status == 1 and 'off, relative, wanted less than' in out and f'fadc-timm/{LIFTED}' not in hub.repos

    status, out = push(lifted(expected_logits=logits), '--push', '--out', tmp_path)
    assert status == 0, out
    sha256 = oid_of('x.bin', lifted.content)
    assert f'base: timm/test_resnet.r160_in1k at {lifted.base.main}, sha256 {sha256}' in out
    card = (tmp_path / LIFTED / 'README.md').read_text()
    assert lifted.base.main in card and sha256 in card and 'base weights, identity FADC' in card
    assert re.search(r"the logits are the base's with a relative error of \d\.\de-\d\d", card)
    table = r'\| `test_resnet` \|.*\| 41\.23 \(160 px\) \|\n\| `test_resnet_fadc` \|.*\| not measured \|\n'
    assert re.search(table, card)
    assert ModelCard(card).data.base_model == 'timm/test_resnet.r160_in1k'
    published = client.call(load, f'hf-hub:fadc-timm/{LIFTED}', photos().numpy(), str(tmp_path / 'cache'))
    plain = client.call(load, 'test_resnet.r160_in1k', photos().numpy())
    assert error(torch.tensor(published['y']), torch.tensor(plain['y'])) < min(LOSSLESS, BUILD_LOSSLESS)

    # a revision is what is lifted, and a hash has to be right
    revision = lifted.base.main
    other = safetensors.torch.save({k: v * 1.5 for k, v in trained('test_resnet').items() if v.is_floating_point()})
    lifted.base.commit({'model.safetensors': other})
    hub.objects[oid_of('x.bin', other)] = other
    base = dict(repository='timm/test_resnet.r160_in1k', revision=revision, sha256=sha256)
    assert push(lifted(expected_logits=logits, base=base))[0] == 0
    status, out = push(lifted(expected_logits=logits, base={**base, 'sha256': '0' * 64}))
    assert status == 1 and f'base.sha256: wanted {"0" * 64}, timm/test_resnet.r160_in1k has {sha256}' in out


def test_refused_licence(hub, push, tmp_path):
    """Before anything is downloaded."""
    path = next(p for p in CONFIGS if p.name.startswith('convnextv2'))
    status, out = push(path, '--push')
    assert status == 1 and "licence: 'cc-by-nc-4.0' does not grant redistribution" in out
    assert not [r for r in hub.log if r['path'] != '/api/agent-harnesses']


def test_wrong_configurations_stop_everything(hub, push, tmp_path):
    (tmp_path / 'x.yaml').write_text('model: 1')
    status, out = push(DEFAULT, tmp_path / 'x.yaml', '--push')
    assert status == 2 and 'x.yaml: model: wanted' in out and not hub.repos
    assert push(tmp_path / 'absent.yaml')[0] == 2


# the card


def test_card(hub, push, client, tmp_path):
    """Front matter, sections, figures that agree with the counters, and usage that runs as it stands."""
    assert push(DEFAULT, '--push', '--out', tmp_path)[0] == 0
    text = (tmp_path / DEFAULT.stem / 'README.md').read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.datasets) == ('timm', 'apache-2.0', ['nasa-blue-marble'])
    assert data.pipeline_tag == 'image-classification' and {'timm', 'fadc', 'transformers'} <= set(data.tags)
    assert re.findall('^##+ .*', text, re.M) == [
        '## Model Details', '## Limits', '## Model Usage', '### Image Classification', '### Feature Map Extraction',
        '### Image Embeddings', '## Model Comparison', '## Citation']
    cost = model_cost('test_resnet_fadc', 6, (3, 160, 160))
    stats = [f'Params (M): {cost.params:.2f}', f'GMACs: {cost.gmacs:.2f}', f'Activations (M): {cost.activations:.2f}']
    for line in (*stats, 'Image size: 160 x 160', '`import fadc_timm`', '76.53 (160 px)', '73.02 (160 px)',
                 'The weakest class is temperate.', 'neighbours', "NASA's Blue Marble"):
        assert line in text, line

    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    assert len(blocks) == 3 and all('hf-hub:' + OURS in block for block in blocks)
    code = '\n'.join((*blocks, 'print(tuple(probabilities.shape), tuple(embedding.shape), tuple(unpooled.shape))'))
    before = len(hub.requests('GET', '^/cdn/'))
    printed = client.call(execute, code).splitlines()
    assert len(hub.requests('GET', '^/cdn/')) == before + 1  # from the server, then from the cache
    assert [f'# {line}' for line in printed[:-1]] == [line for line in blocks[1].splitlines() if line.startswith('# (')]
    assert printed[-1] == '(1, 6) (1, 96) (1, 96, 5, 5)'
