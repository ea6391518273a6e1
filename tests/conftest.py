import math
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
    """Leave to the sweep what says little more of a kernel and takes its interpreter seconds per case."""
    from tests.support.op_checks import CASE
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        if params.get('backend') != 'triton' or params.get('device') == 'cuda':
            continue
        name = params.get('name')
        case = params.get('case') or CASE.get(name)
        interpreted = getattr(case, 'interpreted', 'float32')
        if (
                interpreted == 'sweep'
                or (params.get('dtype', torch.float32) != torch.float32 and interpreted != 'all')
                or ('dilation' in params and name != 'everything')
                or params.get('value') in (math.inf, -math.inf)
                or 'number' in params  # of random cases
                or item.name.startswith('test_threads')
        ):
            item.add_marker(pytest.mark.sweep)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tests on tiny maps: threads cost more than they bring there, tenfold beside another process."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
