"""Lossless: with a base's weights an FADC model gives the base's outputs."""
import pytest
import torch

from tests.support.backbones import (
    BASES,
    LOSSLESS,
    REPRESENTATIVES,
    ROUNDING,
    SMALL,
    TINY,
    fad_convs,
    load,
    module_of,
    photos,
    trained,
    with_tag,
)
from tests.support.cases import error

pytestmark = pytest.mark.usefixtures('one_thread')

VARIANTS = [{}, dict(num_classes=7, in_chans=1, output_stride=16), dict(features_only=True, output_stride=8)]


def with_variants(bases, all_variants=(*TINY, *SMALL, 'resnet26d', 'resnext50_32x4d')):
    """Each base as it is; the variants of most bases are left to the sweep, as they are told apart in few places."""
    return [pytest.param(base, variant, marks=[pytest.mark.sweep] * bool(variant and base not in all_variants))
            for base in bases for variant in VARIANTS]


@torch.no_grad()
def check_lossless(base, state, tolerance=LOSSLESS, options=None, suffix='_fadc', **kwargs):
    plain = load(with_tag(base), state, **kwargs)
    fadc = load(with_tag(base, suffix), state, **kwargs, **(options or {}))
    assert fad_convs(fadc)
    x = photos()[:, torch.arange(kwargs.get('in_chans', 3)) % 3]
    expected, y = plain(x), fadc(x)
    if kwargs.get('features_only'):
        assert len(y) == len(expected)
        assert max(error(a, e) for a, e in zip(y, expected, strict=True)) < tolerance
        return
    if not kwargs:
        assert len(set(expected.argmax(1).tolist())) > 1  # the photographs are told apart
    assert error(y, expected) < tolerance
    assert torch.equal(y.argmax(1), expected.argmax(1))


@pytest.mark.parametrize('base, variant', with_variants(REPRESENTATIVES), ids=str)
def test_lossless(base, variant):
    kwargs = REPRESENTATIVES[base]
    state = trained(base, **kwargs)
    check_lossless(base, state, **kwargs, **variant)
    if not variant:
        check_lossless(base, state, ROUNDING, dict(eps=0.), **kwargs)


@pytest.mark.parametrize('variant', [
    dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(in_chans=5), dict(features_only=True),
    dict(output_stride=8), dict(output_stride=16), dict(global_pool='fast')], ids=str)
@pytest.mark.parametrize('base', TINY + SMALL)
def test_lossless_variants(base, variant):
    check_lossless(base, trained(base), **variant)


@pytest.mark.parametrize(
    'base, variant', with_variants([b for b in REPRESENTATIVES if module_of(b) == 'resnet']), ids=str)
@pytest.mark.parametrize('suffix', [pytest.param('_dcn', marks=pytest.mark.sweep), '_dcn_fadc'])
def test_lossless_deformable(suffix, base, variant):
    """There is no eps, so nothing is left but rounding."""
    kwargs = REPRESENTATIVES[base]
    check_lossless(base, trained(base, **kwargs), ROUNDING, suffix=suffix, **kwargs, **variant)


@pytest.mark.sweep
@pytest.mark.parametrize('variant', VARIANTS, ids=str)
@pytest.mark.parametrize('base', BASES)
def test_lossless_everywhere(base, variant):
    check_lossless(base, trained(base), 1e-3, **variant)  # 5.4e-4 (wide_resnet101_2, of the 21 architectures tried)
