"""FreqSelect's band mix in Triton, around its kernels: tuning, when it is chosen, no Triton, compilation for a GPU."""
import pytest
import torch

from fadc_timm.ops.band_mix import triton as bands
from fadc_timm.ops.band_mix.functional import BACKENDS, choose_backend
from tests.support.processes import python

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('one_thread')


def test_tuning():
    """Once for a key, among few, without those that the device cannot hold."""
    from triton.runtime.errors import OutOfResources
    default = bands.default_config(28, 28, 128, 16, True)
    assert len(bands.candidates(default)) <= 18 and bands.candidates(default)[0] == default
    ran = []

    def run(config):
        ran.append(config)
        if config['num_warps'] == 16:
            raise OutOfResources(100, 10, 'registers')

    def measure(function):
        function()
        return abs(ran[-1]['CB'] - 8) + ran[-1]['num_warps']

    for _ in range(2):
        chosen = bands._choose_config(('test',), default, run, measure)
        assert chosen == {**default, 'CB': 8, 'num_warps': 4}
    assert len(ran) == len(bands.candidates(default))
    del bands._tuned['test',]


def test_never_the_default():
    """Until it has been measured to be faster."""
    assert 'triton' in BACKENDS
    assert choose_backend(torch.empty(0, device='meta')) == 'fused'


def test_without_triton():
    """Everything else runs; with it the kernels are not imported either (test_triton.py)."""
    out = python('''
import sys
sys.modules['triton'] = None
import torch
from fadc_timm.ops import mix_bands
x, weights = torch.randn(1, 2, 5, 5), torch.rand(1, 3, 1, 5, 5)
mix_bands(x, weights, [2, 4, 8])
try:
    mix_bands(x, weights, [2, 4, 8], 'triton')
except NotImplementedError as e:
    print(e)
''')
    assert "backend='triton' cannot mix these bands: Triton is not installed" in out


@pytest.mark.parametrize('only', ['one pixel', pytest.param('', marks=pytest.mark.sweep)], ids=['one pixel', 'all'])
def test_kernels_compile_for_a_gpu(only):
    """The interpreter takes programs that the compiler does not; without a GPU they can still be compiled for one."""
    out = python(f'import sys; sys.argv = ["", "--variants", "--only", {only!r}]\n'
                 'from scripts.checks import inspect_bands; inspect_bands.main()')
    for dtype in ('float16', 'bfloat16', 'float32'):
        for kernel in ('forward', 'backward'):
            assert f', {kernel}, 0, {dtype}, ' in out
