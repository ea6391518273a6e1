import math
import os

import pytest
import torch

# their assertions show values, as those of test files
pytest.register_assert_rewrite(
    'band_cases', 'cases', 'hub_client', 'layer_cases', 'official_cases', 'op_checks', 'processes')

# Triton's kernels run in its interpreter where there is no GPU for them, which is settled when they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

needs_dynamo = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='in one graph: dynamo before torch 2.7 cannot follow the properties of a named tuple')


# Each of several processes has one thread: more of these than cores cost small operators tenfold.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)

# of the operator's cases, those that Triton's interpreter runs in every dtype; the sweep runs all of them
INTERPRETED = {
    'everything', 'plain', 'groups2', 'stride2', 'dilation_groups2', 'depthwise', 'depthwise_plain', 'k1', 'batch0'}
INTERPRETED_SLOWLY = {
    'one_pixel_k7', 'batch33', 'batch37', 'batch37_depthwise', 'dilation_groups_all', 'k7_stride2',
    'depthwise7_no_adakern', 'gradcheck', 'gradcheck_k5', 'gradcheck_depthwise'}


def pytest_collection_modifyitems(items):
    """Leave to the sweep what says little more of a kernel and takes its interpreter seconds for each case."""
    for item in items:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        if params.get('backend') != 'triton' or params.get('device') == 'cuda':
            continue
        name = params['case'].name if 'case' in params else params.get('name')
        if (
                name in INTERPRETED_SLOWLY
                or (params.get('dtype', torch.float32) != torch.float32 and name not in INTERPRETED)
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
