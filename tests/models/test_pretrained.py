"""`pretrained=True` through the real client of the Hub, against a server on this machine."""
import json
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import errors
from timm.models import get_arch_pretrained_cfgs, save_for_hf

import fadc_timm  # noqa: F401  registers the models
from tests.support.backbones import LOSSLESS, TINY, VARIANTS, create_fadc, photos, trained, with_tag
from tests.support.cases import error
from tests.support.hub_client import clients, load
from tests.support.hub_server import TOKEN, oid_of

NAME, BASE = 'test_resnet_fadc.r160_in1k', 'timm/test_resnet.r160_in1k'

pytestmark = pytest.mark.usefixtures('one_thread')
HUB_CLIENTS = 2  # so that they can be asked for something at once


def weights(state):
    return safetensors.torch.save({k: v.contiguous() for k, v in state.items()})


def add_base(hub, base='test_resnet'):
    content = weights(trained(base))
    hub.add(f'timm/{with_tag(base)}', {'model.safetensors': content, 'config.json': b'{}'})
    return content


def downloads(hub):
    return hub.requests('GET', '^/cdn/')


def blobs(cache):
    return [p for p in Path(cache).rglob('*') if p.is_file() or p.is_symlink()
            if '.locks' not in p.parts and p.name not in ('main', 'CACHEDIR.TAG') and '.no_exist' not in p.parts]


def test_pretrained_models_are_listed():
    expected = {f'{arch}{variant}.{tag}' for module, variants in VARIANTS.items()
                for arch in timm.list_models(module=module) for variant in variants
                for tag in (n.partition('.')[2] for n, c in get_arch_pretrained_cfgs(arch).items() if c.has_weights)}
    listed = {name for name in timm.list_pretrained() if name.partition('.')[0].endswith(('_fadc', '_dcn'))}
    assert listed == expected | {'test_resnet_fadc.bluemarble_climate'} and len(listed) > 250


@pytest.mark.parametrize('base', TINY)
def test_lifted_from_the_repository_of_the_base(hub, client, base, tmp_path):
    """One download serves the base, the FADC model, and its feature maps."""
    add_base(hub, base)
    x = photos().numpy()
    plain = client.call(load, with_tag(base), x, str(tmp_path))
    fadc = client.call(load, with_tag(base, '_fadc'), x, str(tmp_path))
    assert plain['error'] is None and fadc['error'] is None
    assert error(torch.tensor(fadc['y']), torch.tensor(plain['y'])) < LOSSLESS
    assert (fadc['y'].argmax(1) == plain['y'].argmax(1)).all() and len(set(plain['y'].argmax(1))) > 1
    for kwargs in (dict(features_only=True), dict(num_classes=7), dict(eps=0.)):
        assert client.call(load, with_tag(base, '_fadc'), cache_dir=str(tmp_path), **kwargs)['error'] is None
    assert len(downloads(hub)) == 1
    assert not any(r['authorised'] for r in hub.log)


def publish(hub, name, tmp_path):
    """A trained FADC model away from the defaults, in a repository of its own, and its logits."""
    options = dict(padding_mode='replicate', dilation_act='relu', bands=(2, 4), num_classes=7)
    model = create_fadc('test_convnext_fadc', **options)
    save_for_hf(model, tmp_path / 'saved', model_args=dict(options), safe_serialization=True)
    hub.add(name, {p.name: p.read_bytes() for p in (tmp_path / 'saved').iterdir()})
    with torch.no_grad():
        return model(photos()).numpy()


def test_published_model(hub, client, tmp_path):
    expected = publish(hub, 'somebody/model', tmp_path)
    for name in ('hf-hub:somebody/model', f'local-dir:{tmp_path / "saved"}'):
        loaded = client.call(load, name, photos().numpy(), str(tmp_path / 'cache'))
        assert loaded['error'] is None and (loaded['y'] == expected).all()
        assert loaded['options'] == {('replicate', (2, 4))}
    revision = hub.repos['somebody/model'].main
    hub.repos['somebody/model'].commit({'config.json': b'{}'})
    assert client.call(load, f'hf-hub:somebody/model@{revision}', cache_dir=str(tmp_path / 'cache'))['error'] is None


def test_broken_download_is_resumed(hub, client, tmp_path):
    """From the last whole chunk of the client, which is 10 MiB; older clients leave that to the next call."""
    content = add_base(hub, 'resnet10t')
    mib = 1 << 20
    cuts = [11 * mib, 15 * mib]

    def cut(handler, whole):
        start = int((handler.headers.get('Range') or 'bytes=0-')[6:-1])
        if not cuts:
            return False
        end = cuts.pop(0)
        handler.send_response(206 if start else 200)
        handler.send_header('Content-Length', str(len(whole) - start))
        handler.end_headers()
        handler.wfile.write(whole[start:end])
        handler.wfile.flush()
        handler.close_connection = True
        return True

    hub.faults['cdn'] = cut
    for _ in range(3):
        loaded = client.call(load, with_tag('resnet10t', '_fadc'), cache_dir=str(tmp_path))
        if loaded['error'] is None:
            break
    assert loaded['error'] is None
    assert [r['range'] for r in downloads(hub)] == [None, f'bytes={10 * mib}-', f'bytes={10 * mib}-']
    blob, = (p for p in blobs(tmp_path) if not p.is_symlink())
    assert blob.name == oid_of('x.bin', content) and blob.read_bytes() == content


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize('damage', [
    lambda c: flip(c, len(c) - 5), lambda c: flip(c, 3), lambda c: flip(c, 200)], ids=['tensor', 'length', 'header'])
@pytest.mark.parametrize('name', [NAME, 'hf-hub:somebody/model'])
def test_damaged_file_is_refused_and_forgotten(hub, client, tmp_path, name, damage):
    add_base(hub)
    publish(hub, 'somebody/model', tmp_path)
    cache = tmp_path / 'cache'
    hub.faults['cdn'] = lambda handler, whole: handler.send_file(damage(whole), {}) or True
    failed = client.call(load, name, cache_dir=str(cache))
    assert failed['type'] == 'DownloadError' and 'SHA-256' in failed['error'] and 'was removed' in failed['error']
    assert [p for p in blobs(cache) if p.suffix == '.safetensors' or len(p.name) == 64] == []
    hub.faults.clear()
    assert client.call(load, name, cache_dir=str(cache))['error'] is None
    assert len(downloads(hub)) == 2


def test_damaged_file_of_the_base_is_refused(hub, client, tmp_path):
    """timm itself does not compare hashes: what it left in the cache is found out once it cannot be read."""
    content = add_base(hub)
    hub.faults['cdn'] = lambda handler, whole: handler.send_file(flip(whole, 3), {}) or True
    assert client.call(load, 'test_resnet.r160_in1k', cache_dir=str(tmp_path))['type'] == 'SafetensorError'
    assert blobs(tmp_path)
    assert client.call(load, NAME, cache_dir=str(tmp_path))['type'] == 'DownloadError'
    assert not blobs(tmp_path)
    hub.faults.clear()
    assert client.call(load, NAME, cache_dir=str(tmp_path))['error'] is None
    assert content == next(p for p in blobs(tmp_path)).read_bytes()


def test_truncated_file_is_refused(hub, client, tmp_path):
    """One that ends early and says so; one that ends early and does not is resumed."""
    content = add_base(hub)
    hub.faults['cdn'] = lambda handler, whole: handler.send_file(whole[:-100], {}) or True
    failed = client.call(load, NAME, cache_dir=str(tmp_path))
    assert failed['type'] == 'DownloadError' and [p for p in blobs(tmp_path) if p.suffix != '.incomplete'] == []
    assert f'should be of size {len(content)} but has size {len(content) - 100}' in failed['error']
    assert failed['error'].startswith(f'Cannot load the weights of {NAME} from the Hub repository {BASE}: ')


def test_two_processes_at_once(hub, client, tmp_path):
    """Into one cache; the second waits for the first, or downloads as well, and both get the whole file."""
    add_base(hub)

    def slowly(handler, whole):
        time.sleep(0.5)
        return False

    hub.faults['cdn'] = slowly
    x, at = photos().numpy(), time.time() + 1
    started = [client.start(load, NAME, x, str(tmp_path), at=at) for _ in range(2)]
    a, b = (f.result(timeout=300) for f in started)
    assert a['error'] is None and b['error'] is None
    assert (a['y'] == b['y']).all()
    assert len(hub.requests('HEAD', 'resolve/main/model.safetensors')) == 2 and len(downloads(hub)) in (1, 2)
    assert not list(tmp_path.rglob('*.incomplete'))


@pytest.mark.parametrize('kwargs', [
    dict(features_only=True, out_indices=(7,)), dict(features_only=True, feature_cls='no_such'), dict(bandz=(2,)),
    dict(dilation_act='gelu')], ids=str)
def test_wrong_arguments_download_nothing(hub, client, tmp_path, kwargs):
    """timm looks at those of feature maps after it loaded the weights."""
    add_base(hub)
    assert client.call(load, NAME, cache_dir=str(tmp_path), **kwargs)['error'] is not None
    assert not downloads(hub)


def test_refusals_are_told_apart(hub, client, tmp_path):
    def failure(token):
        failed = client.call(load, NAME, cache_dir=str(tmp_path), token=token)
        assert failed['type'] == 'DownloadError'
        first, rest = failed['error'].split('\n', 1)
        assert first.startswith(f'Cannot load the weights of {NAME} from the Hub repository {BASE}: ')
        assert 'local-dir:' in rest and 'test_resnet_fadc' in rest
        assert not token or token not in failed['error']
        return first.removeprefix(f'Cannot load the weights of {NAME} from the Hub repository {BASE}: ')

    assert failure(TOKEN) == '404, there is no such repository.'
    assert failure(None).startswith('401, not authorised: ')  # as the Hub: it does not tell strangers what exists
    add_base(hub)
    hub.repos[BASE].private = True
    assert failure(None).startswith('401, not authorised: the repository is private or gated')
    assert failure('hf_wrong').startswith('401, not authorised: ')
    assert client.call(load, NAME, cache_dir=str(tmp_path), token=TOKEN)['error'] is None
    hub.add(BASE, {'config.json': b'{}'})
    assert failure(None) == '404, the repository has no such file.'
    # and for models that are named by their repository, by the client itself
    for name, token, status in (('absent', TOKEN, '404'), ('private', None, '401')):
        hub.add('somebody/private', {'config.json': b'{}'}, private=True)
        failed = client.call(load, f'hf-hub:somebody/{name}', token=token)
        assert issubclass(getattr(errors, failed['type']), errors.HfHubHTTPError) and f'{status} ' in failed['error']


def test_the_token_goes_to_the_hub_alone(hub, client, tmp_path):
    add_base(hub)
    assert client.call(load, NAME, cache_dir=str(tmp_path), token=TOKEN)['error'] is None
    assert all(r['authorised'] for r in hub.requests('HEAD', '/resolve/'))
    assert downloads(hub) and not any(r['authorised'] for r in downloads(hub))
    assert not any(TOKEN.encode() in p.read_bytes() for p in tmp_path.rglob('*') if p.is_file())


def test_a_pickle_runs_no_code(hub, client, tmp_path):
    """The Hub's older files are pickles."""
    torch.save(trained('test_resnet'), tmp_path / 'good')
    torch.save({'fc.weight': Payload(tmp_path / 'ran')}, tmp_path / 'bad')
    hub.add(BASE, {'pytorch_model.bin': (tmp_path / 'good').read_bytes()})
    assert client.call(load, NAME, cache_dir=str(tmp_path / 'a'))['error'] is None
    hub.add(BASE, {'pytorch_model.bin': (tmp_path / 'bad').read_bytes()})
    failed = client.call(load, NAME, cache_dir=str(tmp_path / 'b'))
    assert 'weights_only=True blocked' in failed['error'] and not (tmp_path / 'ran').exists()


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_offline(hub, client, tmp_path):
    add_base(hub)
    cached = str(tmp_path / 'cached')
    assert client.call(load, 'test_resnet.r160_in1k', cache_dir=cached)['error'] is None
    publish(hub, 'somebody/model', tmp_path)
    before = len(hub.log)
    with clients(hub, tmp_path / 'hf', HF_HUB_OFFLINE='1') as offline:
        failed = offline.call(load, 'resnet50_fadc')
        assert failed['type'] == 'DownloadError'
        first, hint = failed['error'].split('\n')
        assert 'resnet50_fadc.a1_in1k' in first and 'timm/resnet50.a1_in1k' in first and 'HF_HUB_OFFLINE' in first
        assert "'test_resnet_fadc'" in hint and "'local-dir:FOLDER'" in hint and 'fadc-timm convert SOURCE' in hint
        # the base's file is enough; so is a folder, and the package
        assert offline.call(load, NAME, cache_dir=cached)['error'] is None
        assert offline.call(load, f'local-dir:{tmp_path / "saved"}')['error'] is None
        assert offline.call(load, 'test_resnet_fadc')['error'] is None
        for name in ('ecaresnext26t_32x4d', 'test_resnet.nothing'):  # no weights: as timm says it
            ours, theirs = (offline.call(load, n) for n in (name.replace('.', '_fadc.', 1) if '.' in name else
                                                           f'{name}_fadc', name))
            assert ours['type'] == theirs['type'] == 'RuntimeError'
            assert ours['error'].replace('_fadc', '') == theirs['error']
    assert len(hub.log) == before


def test_config_that_is_no_json(hub, client, tmp_path):
    """timm refuses it as it reads it; the model is not built."""
    publish(hub, 'somebody/model', tmp_path)
    files = hub.repos['somebody/model'].files
    assert json.loads(files['config.json'])['model_args']['padding_mode'] == 'replicate'
    files['config.json'] = files['config.json'][:-20]
    failed = client.call(load, 'hf-hub:somebody/model', cache_dir=str(tmp_path / 'cache'))
    assert failed['type'] == 'JSONDecodeError'
