import pytest
import torch

needs_dynamo = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='in one graph: dynamo before torch 2.7 cannot follow the properties of a named tuple')


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
