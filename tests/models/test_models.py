"""What timm expects of a model: features, classifiers, training machinery, copies, compilers."""
import copy
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.backbones import (
    LOSSLESS,
    REPRESENTATIVES,
    SMALL,
    TINY,
    check_learns,
    create_fadc,
    fad_convs,
    load,
    photos,
    trained,
    with_tag,
)
from tests.support.cases import error
from tests.support.off_identity import off_identity

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.integration(package='timm', what='features_only: list, dict, hook, getter, torch.fx')
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter', 'fx'])
@pytest.mark.parametrize('base', SMALL)
@torch.no_grad()
def test_features(base, feature_cls):
    name = with_tag(base, '_fadc')
    model = create_fadc(name)
    expected = model.forward_intermediates(photos(), intermediates_only=True)
    for out_indices in (None, (1, 3)):
        kwargs = {} if out_indices is None else dict(out_indices=out_indices)
        net = load(name, model.state_dict(), features_only=True, feature_cls=feature_cls, **kwargs)
        y = net(photos())
        y = list(y.values()) if isinstance(y, dict) else y
        wanted = expected if out_indices is None else [expected[i] for i in out_indices]
        assert len(y) == len(wanted) == len(net.feature_info.channels())
        assert all(torch.equal(a, e) for a, e in zip(y, wanted))
        for f, channels, reduction in zip(y, net.feature_info.channels(), net.feature_info.reduction()):
            assert f.shape[1:] == (channels, 64 // reduction, 64 // reduction)


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_symbolic_trace(base):
    """torch.fx without timm's tracer: FADC's layers are leaves of themselves."""
    model = create_fadc(f'{base}_fadc')
    traced = torch.fx.symbolic_trace(model)
    leaves = {node.target for node in traced.graph.nodes if node.op == 'call_module'}
    assert {*fad_convs(model)} <= leaves and not any('.ada_dr' in name for name in leaves)
    for x in (photos(), photos(96)[:2]):
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_reparameterize(base):
    """timm's --reparam: AdaKern's BatchNorms are folded, in a copy."""
    model = create_fadc(f'{base}_fadc', ada_kern_norm='batchnorm2d')
    expected = model(photos())
    folded = timm.utils.reparameterize_model(model)
    for m, norm in ((model, nn.BatchNorm2d), (folded, nn.Identity)):
        assert all(type(layer.ada_kern.norm) is norm for layer in fad_convs(m).values())
    assert error(folded(photos()), expected) < 1e-5


@pytest.mark.parametrize('base', SMALL)
@torch.no_grad()
def test_intermediates(base):
    model = create_fadc(f'{base}_fadc')
    last, every = model.forward_intermediates(photos())
    assert torch.equal(last, model.forward_features(photos()))
    indices = [1, 2]
    some = model.forward_intermediates(photos(), indices=indices, intermediates_only=True)
    assert all(torch.equal(a, every[i]) for a, i in zip(some, indices, strict=True))
    before = len(fad_convs(model))
    assert model.prune_intermediate_layers(indices) == indices
    assert 0 < len(fad_convs(model)) < before
    some = model.forward_intermediates(photos(), indices=indices, intermediates_only=True)
    assert all(torch.equal(a, every[i]) for a, i in zip(some, indices, strict=True))


@pytest.mark.parametrize('base', TINY)
def test_classifier(base):
    model = create_fadc(f'{base}_fadc', num_classes=9)
    assert model(photos()).shape == (6, 9)
    features = model.forward_features(photos())
    model.reset_classifier(5)
    assert model(photos()).shape == (6, 5) and model.num_classes == 5
    assert torch.equal(model.forward_features(photos()), features)
    model.reset_classifier(0, 'max')
    assert model(photos()).shape == (6, model.num_features)
    assert model.get_classifier() is not None


@pytest.mark.parametrize('base', SMALL)
def test_layer_decay(base):
    """Every parameter in one group; those of FADC in that of the convolution that they belong to."""
    scales = {}
    for name in (base, f'{base}_fadc'):
        with torch.device('meta'):
            model = timm.create_model(name)
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
        group_of = {p: g for g in groups for p in g['params']}
        assert sum(len(g['params']) for g in groups) == len(group_of) == len(list(model.parameters()))
        scales[name] = {n: (group_of[p]['lr_scale'], group_of[p]['weight_decay']) for n, p in model.named_parameters()}
    plain, fadc = scales.values()
    assert plain.items() <= fadc.items() and len(set(plain.values())) > 4
    for conv, m in fad_convs(model).items():
        for n, p in m.named_parameters():
            assert fadc[f'{conv}.{n}'] == (fadc[f'{conv}.weight'][0], 0.05 if p.ndim > 1 else 0)


@pytest.mark.parametrize('base', TINY)
def test_gradient_checkpointing(base):
    results = []
    for enable in (False, True):
        model = create_fadc(f'{base}_fadc', num_classes=9).train()
        model.set_grad_checkpointing(enable)
        y = model(photos())
        y.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append((y, *(p.grad for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize('base', SMALL)
def test_drop_path(base):
    def rates(name):
        model = timm.create_model(name, drop_path_rate=0.4)
        return model, [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']

    (_, expected), (model, actual) = rates(base), rates(f'{base}_fadc')
    assert actual == expected and max(actual) == pytest.approx(0.4)
    model(photos()).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('base', TINY)
def test_factory_arguments(base):
    model = timm.create_model(f'{base}_fadc', device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    assert model(torch.zeros(2, 3, 64, 64, device='meta', dtype=torch.bfloat16)).shape == (2, model.num_classes)
    model = load(with_tag(base, '_fadc'), trained(base), dtype=torch.float64, eps=0.)
    plain = load(with_tag(base), trained(base), dtype=torch.float64)
    assert error(model(photos().double()), plain(photos().double())) < 1e-12  # 3.2e-15
    model = timm.create_model(f'{base}_fadc', dtype=torch.bfloat16).eval()
    assert model(photos().bfloat16()).isfinite().all()


@pytest.mark.parametrize('base', ['test_resnet', 'resnet18', 'resnet50c', 'resnet50_gn', 'seresnet18', 'resnetaa50'])
@torch.no_grad()
def test_init_weights(base):
    """Starts anew, with FADC as the identity."""
    kwargs = dict(num_classes=9, **REPRESENTATIVES[base])
    model, plain = create_fadc(f'{base}_fadc', **kwargs), timm.create_model(base, **kwargs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights(zero_init_last=False)
    state = model.state_dict()
    assert not any(torch.equal(state[f'{n}.weight'], before[f'{n}.weight']) for n in fad_convs(model))
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    assert error(model(photos()), plain.eval()(photos())) < LOSSLESS


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_torchscript(base):
    model = create_fadc(f'{base}_fadc')
    assert error(torch.jit.script(model)(photos()), model(photos())) < 2e-6  # 6.0e-7
    net = create_fadc(f'{base}_fadc', features_only=True)
    for a, e in zip(torch.jit.script(net)(photos()), net(photos()), strict=True):
        assert error(a, e) < 2e-6  # 5.0e-7


@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_copies(base):
    model = create_fadc(f'{base}_fadc')
    assert type(model).__name__ in ('FADCResNet', 'FADCConvNeXt')
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(photos()), model(photos()))


@pytest.mark.parametrize('global_pool', ['fast', 'avg', 'max', ''])
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_global_pool(base, global_pool):
    """benchmark.py passes 'fast'."""
    state = trained(base)
    kwargs = dict(global_pool=global_pool, num_classes=9 if global_pool else 0)
    model, plain = load(with_tag(base, '_fadc'), state, **kwargs), load(with_tag(base), state, **kwargs)
    assert error(model(photos()), plain(photos())) < LOSSLESS


@pytest.mark.parametrize('size', [(33, 47), (64, 97), (160, 32)], ids=str)
@pytest.mark.parametrize('base', TINY)
@torch.no_grad()
def test_any_size(base, size):
    state = trained(base)
    model, plain = load(with_tag(base, '_fadc'), state), load(with_tag(base), state)
    x = nn.functional.interpolate(photos(), size, mode='bilinear')
    assert error(model(x), plain(x)) < LOSSLESS


@pytest.mark.parametrize('base', TINY)
def test_training(base):
    """Learns the photographs by heart; then batch 1."""
    model = timm.create_model(f'{base}_fadc', num_classes=6)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    check_learns(model, optimizer)
    model(photos()[:1]).sum().backward()


# the last stage alone: symbolic sizes cost seconds per layer
LAST = dict(fadc_stages=(False, False, False, True))


@pytest.mark.integration(package='torch', what='torch.compile, one graph: any batch and size, training too')
@pytest.mark.parametrize('training', [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize('base, kwargs', [
    ('test_resnet', LAST),
    pytest.param('resnet10t', {}, marks=pytest.mark.sweep),
    pytest.param('test_convnext', {}, marks=pytest.mark.sweep)])
def test_compile_any_batch_and_size(base, kwargs, training):
    """One graph for all batches and sizes, forward and backward."""
    model = timm.create_model(f'{base}_fadc', num_classes=3, **kwargs).train(training)
    off_identity(model, 0.3)
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for batch, height, width in ((2, 64, 96), (3, 96, 64), (5, 128, 160)):
        x = torch.randn(batch, 3, height, width)
        with torch.set_grad_enabled(training):  # else a graph is made of the backward pass too
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        if training:
            model.zero_grad()
            compiled(x).square().sum().backward()
            actual = [p.grad for p in model.parameters()]
            model.zero_grad()
            model(x).square().sum().backward()
            for a, p in zip(actual, model.parameters()):
                assert (a - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # as many as after the first
