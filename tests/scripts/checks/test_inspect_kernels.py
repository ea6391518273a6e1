"""The Triton kernels compiled for a GPU that is not there."""
import pytest

from tests.support.marks import has_old_triton
from tests.support.processes import python

pytest.importorskip('triton')

pytestmark = pytest.mark.skipif(has_old_triton, reason='torch before 2.9 brings a Triton that is too old')

DENSE = (
    'dense_kernels pack', 'dense_kernels columns', 'dense_kernels combine', 'dense_kernels spread',
    'dense_kernels scatter_columns', 'dense_kernels unpack', 'dense_kernels sampling_gradient',
    'dense_kernels gains_gradient')
DEPTHWISE = tuple(f'depthwise_kernels {name}' for name in ('forward', 'backward', 'products', 'kernel_gradient'))
BANDS = tuple(f'kernels {name}' for name in (
    'synthesise_rows', 'mix', 'mix_gradient', 'rows_gradient', 'synthesise_rows_gradient'))
GAINS = tuple(f'kernels {name}' for name in (
    'trunk', 'trunk_gradient', 'norm', 'norm_gradient', 'heads', 'heads_gradient', 'trunk_and_heads'))


@pytest.mark.parametrize('only, kernels', [
    ('one pixel', DENSE + DEPTHWISE + BANDS + GAINS),
    pytest.param('', DENSE + DEPTHWISE + BANDS + GAINS, marks=pytest.mark.sweep)], ids=['one pixel', 'all'])
def test_kernels_compile_for_a_gpu(only, kernels):
    """The interpreter takes programs that the compiler does not; without a GPU they can still be compiled for one."""
    out = python(f'import sys; sys.argv = ["", "--variants", "--only", {only!r}]\n'
                 'from scripts.checks import inspect_kernels; inspect_kernels.main()')
    for kernel in kernels:
        assert f', {kernel}, ' in out, kernel


def test_images_of_many_sizes_share_kernels():
    """Triton compiles a kernel anew where a number is 1 or a multiple of 16, unless it is told not to."""
    out = python('from scripts.checks.inspect_kernels import count_kernels\n'
                 'print(count_kernels([500]), count_kernels(range(500, 530)))')
    one, many = map(int, out.split())
    assert many < 2 * one
