"""What belongs to no operator."""
import pytest
import torch

from fadc_timm.ops.runtime import wide_product
from tests.support.no_copies import no_copies


@pytest.mark.parametrize('batch', [(), (3,)], ids=['matrices', 'batches'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_wide_product(dtype, batch):
    """In float32 or float64, not rounded to half precision on the way; autocast changes nothing."""
    a, b = torch.randn(*batch, 5, 70).to(dtype), torch.randn(*batch, 70, 4).to(dtype)
    expected = a.double() @ b.double()
    y = wide_product(a, b)
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert (y - expected).abs().max() < 1e-5
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(wide_product(a, b), y)
    with no_copies():
        a, b = (torch.empty(t.shape, dtype=dtype, device='cuda') for t in (a, b))
        assert wide_product(a, b).dtype == y.dtype
