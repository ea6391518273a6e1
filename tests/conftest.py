import os

import pytest
import torch

# their assertions show values, as those of test files
pytest.register_assert_rewrite('tests.support')

# Triton's kernels run in its interpreter where there is no GPU for them, which is settled when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Each of several processes has one thread: more of these than cores cost small operators tenfold.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Leave to the sweep what says little more of a kernel and takes its interpreter seconds per case.

    With a Triton that is too old for the backend, its tests are skipped.
    """
    from tests.support.marks import has_old_triton
    from tests.support.op_checks import CASE
    for item in items:
        if ' at 0x' in item.nodeid:
            raise pytest.UsageError(f'the processes of a run must give a test one name, got {item.nodeid}: give ids')
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        of_triton = item.path.stem.startswith('test_triton') or item.path.parent.name == 'gains' or any(
            isinstance(value, str) and value == 'triton' for value in params.values())
        if has_old_triton and of_triton:
            item.add_marker(pytest.mark.skip(reason='the backend refuses the Triton that torch before 2.9 brings'))
        if params.get('backend') != 'triton' or params.get('device') == 'cuda':
            continue
        mark = item.get_closest_marker('interpreted')
        if mark is not None:
            runs = any(all(word in item.callspec.id for word in words.split()) for words in mark.args)
        else:
            case = params.get('case') or CASE.get(params.get('name'))
            interpreted = getattr(case, 'interpreted', 'float32')
            runs = interpreted == 'all' or (
                interpreted == 'float32' and params.get('dtype', torch.float32) == torch.float32)
        if not runs:
            item.add_marker(pytest.mark.sweep)


@pytest.fixture(autouse=True, scope='session')
def fast_interpreter():
    """Its time goes with the number of programs: one for all positions of a sample of most cases."""
    from fadc_timm.ops import triton_support
    from fadc_timm.ops.sampled_conv.triton import dense, depthwise
    from tests.support.interpreter import interpret_fast
    dense._INTERPRETED = 64
    if not torch.cuda.is_available():
        if triton_support.unavailable() is None:
            interpret_fast()
        for name in ('_FORWARD', '_BACKWARD', '_PRODUCTS'):
            setattr(depthwise, name, (64, *getattr(depthwise, name)[1:]))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_tf32():
    """In TF32, torch's default for convolutions on a GPU, results are off by 1e-3 and not by the tests' tolerances."""
    products = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed = [p.allow_tf32 for p in products]
    for p in products:
        p.allow_tf32 = False
    yield
    for p, allow in zip(products, allowed):
        p.allow_tf32 = allow


@pytest.fixture
def skip_where_compiled(request):
    """With a GPU there is no interpreter for the cases of Triton's kernels on a CPU."""
    from fadc_timm.ops import triton_support
    callspec = getattr(request.node, 'callspec', None)
    if callspec and callspec.params.get('device') == 'cpu' and not triton_support.is_interpreted():
        pytest.skip('the kernels are compiled here, see pytest -m gpu')


@pytest.fixture
def skip_unless_triton_runs(request):
    """On a machine with a GPU kernels are not interpreted, and run there alone."""
    from fadc_timm.ops import triton_support
    reason = triton_support.why_not_on(request.getfixturevalue('device'))
    if reason:
        pytest.skip(reason)


@pytest.fixture
def one_thread():
    """For tests on tiny maps: threads cost more than they bring there, tenfold beside another process."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def hub():
    """A server on this machine that speaks as the Hub does; every test finds it empty."""
    from tests.support.hub_server import Hub
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """The folder of the Hub's client."""
    return tmp_path_factory.mktemp('hf')


@pytest.fixture(scope='module')
def client(hub, home, request):
    """The Hub's real client, in as many processes as the module's HUB_CLIENTS says, else in one."""
    from tests.support.hub_client import clients
    with clients(hub, home, getattr(request.module, 'HUB_CLIENTS', 1)) as client:
        yield client


@pytest.fixture(autouse=True)
def empty_hub(request):
    if 'hub' in request.fixturenames:
        request.getfixturevalue('hub').clear()
