"""Marks of tests."""
import pytest
import torch
from torch.torch_version import TorchVersion

before_torch_2_8 = TorchVersion(torch.__version__) < (2, 8)
needs_is_exporting = pytest.mark.skipif(
    before_torch_2_8,
    reason="strict exports in torch's own operators: dynamo before torch 2.8 does not say whether it captures one")

# torch 2.11 asks whether tables that a product reads are contiguous, and takes the answer for a limit of their size
asks_about_sizes = TorchVersion(torch.__version__) < (2, 14)
needs_any_size = pytest.mark.skipif(asks_about_sizes, reason='exports of any size: torch 2.11 limits the sizes')

# earlier ones ask more, also where dynamo captures the graph
before_torch_2_11 = TorchVersion(torch.__version__) < (2, 11)
needs_torch_2_11 = pytest.mark.skipif(
    before_torch_2_11, reason='exports of any size: torch before 2.11 limits the sizes')

# the backend refuses the Triton that an earlier torch brings
has_old_triton = TorchVersion(torch.__version__) < (2, 9)
