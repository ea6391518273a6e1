"""`import fadc_timm`: what it brings, and that it imports little more than timm does."""
import ast
import sys
from pathlib import Path

import pytest

import fadc_timm
from tests.support.processes import python

PACKAGE = Path(fadc_timm.__file__).parent


def test_imports_nothing_that_timm_does_not():
    """A measure of its time that does not depend on the machine; `scripts.bench.model --what import` takes the time."""
    added = python('import sys, timm; before = set(sys.modules)\n'
                   'import fadc_timm; print(*sorted(set(sys.modules) - before))').split()
    packages = {name.partition('.')[0] for name in added}
    assert packages - set(sys.stdlib_module_names) <= {'fadc_timm', 'torch'}
    ours = {'.'.join(name.split('.')[:2]) for name in added if name.startswith('fadc_timm.')}
    assert ours == {f'fadc_timm.{name}' for name in ('layers', 'losses', 'models', 'ops')}
    # torch imports few of its own modules for operators that are only registered
    assert len([name for name in added if name.startswith('torch.')]) < 40 and 'torch._dynamo' not in added


def test_modules_are_reachable():
    members = ('checkpoints.convert', 'hub.push_folder', 'layers.FADConv2d', 'load', 'losses.dilation_frequency_loss',
               'official.load_layer', 'ops.adaptive_dilated_conv2d', 'ops.deform_conv2d', 'param_groups', 'save',
               'visualize.collect')
    out = python(f'import sys, fadc_timm; print({", ".join(f"callable(fadc_timm.{m})" for m in members)})\n'
                 'import fadc_timm.cli; print("matplotlib" in sys.modules)')
    assert out.split() == ['True'] * len(members) + ['False']
    names = {m.partition('.')[0] for m in members}
    assert names <= set(dir(fadc_timm)) and names <= set(fadc_timm.__all__)


def test_names():
    """Everything in `__all__` is there, and nothing else is shown."""
    assert {name for name in dir(fadc_timm) if not name.startswith('__')} == set(fadc_timm.__all__)
    assert all(hasattr(fadc_timm, name) for name in fadc_timm.__all__)
    assert fadc_timm.models.lift_model is fadc_timm.lift_model and '__version__' in dir(fadc_timm)


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'fadc_timm' has no attribute 'nothing'"):
        _ = fadc_timm.nothing


# Where a module may import from: rooms of a smaller number, and its own.
ROOMS = {
    '_writing': 0, 'ops.runtime': 0, 'ops.settings': 0, 'ops.kept_tables': 0, 'ops.triton_math': 0,
    'ops.derivatives': 1, 'ops.onnx_nodes': 1, 'ops.triton_support': 1, 'ops.sampled_conv': 2, 'ops.band_mix': 2,
    'ops.neighborhood_attention': 2, 'ops.few_outputs': 2, 'ops.gains': 2, 'ops.flops': 3, 'ops': 4, 'layers': 5,
    'models': 6, 'checkpoints': 7, 'visualize': 7, 'losses': 7, 'hub': 8, '': 9, 'cli': 10, '__main__': 11}


def room(module):
    """The room of a module, whose name is without that of the package."""
    parts = module.split('.')
    return next(name for name in ('.'.join(parts[:2]), parts[0], '') if name in ROOMS)


def imports(path):
    """Names of the modules of the package that a file imports."""
    here = ['fadc_timm', *path.relative_to(PACKAGE).with_suffix('').parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level] if node.level else []
            base += node.module.split('.') if node.module else []
            for name in node.names:
                found = [*base, name.name] if (PACKAGE.parent.joinpath(*base, name.name).is_dir()
                                               or PACKAGE.parent.joinpath(*base, f'{name.name}.py').is_file()) else base
                if found[0] == 'fadc_timm':
                    yield '.'.join(found[1:])


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_runs_upwards(path):
    own = room('.'.join(p for p in path.relative_to(PACKAGE).with_suffix('').parts if p != '__init__'))
    for module in imports(path):
        assert room(module) == own or ROOMS[room(module)] < ROOMS[own], f'{own} imports {module}'


# Each was tried with torch 2.6. What torch lacks there, or may drop, is asked for with getattr.
PRIVATE = {
    'torch._C', 'torch._C.DispatchKey', 'torch._C.DispatchKeySet', 'torch._C._ExcludeDispatchKeyGuard',
    'torch._C._autograd', 'torch._C._cuda_getCurrentRawStream', 'torch._C._dynamo',
    'torch._C._functorch.is_legacy_batchedtensor', 'torch._C._functorch.peek_interpreter_stack',
    'torch._C._len_torch_dispatch_stack', 'torch._C._len_torch_function_stack', 'torch._decomp.register_decomposition',
    'torch._softmax_backward_data', 'torch.autograd.forward_ad._current_level',
    'torch.ops.aten._embedding_bag_per_sample_weights_backward',
    'torch.ops.fadc_timm.sampled_conv2d.default._schema.arguments', 'torch.ops.mkldnn._linear_pointwise',
    'torch.ops.torchvision._deform_conv2d_backward'}


def test_private_names_of_torch():
    """A name that the floor of torch lacks would break every call there, and no test of a newer torch sees it."""
    used = set()
    for path in PACKAGE.rglob('*.py'):
        inner = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node not in inner:
                inner.add(node.value)  # `torch.a` of `torch.a.b`: walk comes to it later
                name = ast.unparse(node)
                if name.startswith('torch.') and '(' not in name and any(
                        part.startswith('_') and not part.startswith('__') for part in name.split('.')):
                    used.add(name)
    assert used == PRIVATE
