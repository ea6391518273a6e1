"""`fadc-timm push`: a model of one's own on the Hub, through the real client against a server on this machine."""
import re

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import fadc_timm
from fadc_timm.models.cost import module_cost
from tests.support.backbones import create_fadc, photos
from tests.support.hub_client import execute, load, script
from tests.support.hub_server import TOKEN

FILES = ['README.md', 'config.json', 'model.safetensors']

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def push(client):
    def call(*args, token=TOKEN):
        run = client.call(script, 'fadc_timm.cli', 'push', *map(str, args), token=token)
        assert TOKEN not in run['out']
        return run['status'], run['out']
    return call


def posts(hub):
    return [r for r in hub.log if r['method'] in ('POST', 'PUT')]


def networks(name):
    if name == 'family':
        return create_fadc('test_resnet_fadc', num_classes=3)
    model = timm.create_model('regnetx_002', num_classes=3 if name == 'lifted' else 0)
    fadc_timm.lift_model(model)
    return model.eval()


@pytest.mark.parametrize('name', ['family', 'lifted', 'lifted, no classes'])
def test_push(hub, client, push, name, tmp_path):
    """Saved, shown, pushed in one commit, and loaded from there; the card's code runs as it stands."""
    model = networks(name)
    ours = f'me/{name.replace(", ", "_").replace(" ", "_")}'  # the client's cache goes by names
    labels = ['sea', 'sky', 'city'] if model.num_classes else None
    folder = fadc_timm.save(model, tmp_path / 'own', pretrained_cfg=dict(
        label_names=labels, license='mit', input_size=(3, 96, 64)))
    (tmp_path / 'about.md').write_text('## About\nTrained on the roof: top-1 is 12.3 %.\n')
    args = ('--about', tmp_path / 'about.md', '--dataset', 'me/roofs', '--base-model', 'timm/plain')
    status, out = push(folder, ours, *args, '--dry-run')
    assert status == 0 and f'nothing was sent to {ours}' in out and not posts(hub), out
    assert sorted(p.name for p in folder.iterdir()) == FILES
    card = folder / 'README.md'
    card.write_text(card.read_text() + '\nEdited by hand.\n')
    status, out = push(folder, ours)
    assert status == 0 and f"fadc_timm.load('hf-hub:{ours}')" in out, out
    assert f'pushed README.md, config.json, model.safetensors: {hub.endpoint}/{ours}/commit/' in out
    repo = hub.repos[ours]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        k: v for k, v in repo.files.items() if k != '.gitattributes'} and len(repo.commits) == 2

    with torch.no_grad():
        expected = model(photos(96)).numpy()
    published = client.call(load, f'hf-hub:{ours}', photos(96).numpy(), str(tmp_path / 'cache'))
    assert published['error'] is None and (published['y'] == expected).all()

    text = repo.files['README.md'].decode()
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.base_model) == ('mit', ['me/roofs'], 'timm/plain')
    cost = module_cost(fadc_timm.load(folder).to('meta').eval(), (3, 96, 64))
    for line in (f'**Params (M):** {cost.params:.2f}', f'**GMACs:** {cost.gmacs:.2f}', '3 x 96 x 64', 'top-1 is 12.3 %',
                 'Edited by hand.', '`import fadc_timm`', *(['; '.join(labels)] if labels else [])):
        assert line in text, line
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    assert len(blocks) == (3 if labels else 2) and all(f"'hf-hub:{ours}'" in block for block in blocks)
    maps = next(block for block in blocks if 'features_only' in block)
    printed = client.call(execute, '\n'.join((*blocks, 'print(tuple(embedding.shape), tuple(unpooled.shape))')))
    *shapes, last = printed.splitlines()
    assert [f'# {line}' for line in shapes] == [line for line in maps.splitlines() if line.startswith('# (')]
    assert f'# {last.partition(") ")[0]})' in blocks[-1 if labels else 0] and last.partition(') ')[2] in text

    # again: nothing changed; a card that somebody edited there stays
    assert push(folder, ours)[0] == 0 and len(repo.commits) == 2
    repo.commit({**repo.files, 'README.md': b'theirs'})
    status, out = push(folder, ours)
    assert status == 0 and 'the card that was there stays' in out and repo.files['README.md'] == b'theirs'
    assert push(folder, ours, '--update-card')[0] == 0 and repo.files['README.md'] == card.read_bytes()


def test_refusals(hub, push, tmp_path):
    """One line each, and nothing is sent."""
    model = create_fadc('test_resnet_fadc', num_classes=3)
    folder = fadc_timm.save(model, tmp_path / 'own')
    bare = fadc_timm.save(model, tmp_path / 'bare', pretrained_cfg=dict(license=None))

    def refused(message, *args, token=TOKEN):
        status, out = push(*args, token=token)
        lines = [line for line in out.splitlines() if 'fadc-timm: error' in line]
        assert status == 2 and len(lines) == 1 and re.search(message, lines[0]), out
        assert not hub.repos

    refused("no folder '.*absent' of a model", tmp_path / 'absent', 'me/own')
    refused('has no config.json', tmp_path, 'me/own')
    refused("OWNER/NAME, got 'own'", folder, 'own')
    refused('push: ', folder, 'me/own/again')
    refused('says no licence: give --license', bare, 'me/own')
    refused('--license mit: .*config.json says apache-2.0.*pretrained_cfg=dict', folder, 'me/own', '--license', 'mit')
    refused('absent.md', folder, 'me/own', '--about', tmp_path / 'absent.md')
    refused('401', bare, 'me/own', '--license', 'mit', token=None)
    refused('README.md is there already, and --about would change nothing', bare, 'me/own', '--about', __file__)
    (folder / 'notes.txt').write_text('mine')
    refused('wanted README.md, config.json, model.safetensors, got .*notes.txt', folder, 'me/own')
    (folder / 'notes.txt').unlink()
    weights = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(weights[:-100])
    refused('cut off', folder, 'me/own')
    (folder / 'model.safetensors').write_bytes(weights)
    status, out = push(folder, 'me/own', '--new-card', '--private')
    assert status == 0 and 'README.md: written' in out and list(hub.repos) == ['me/own']
