"""The authors' vectors, and how close to them a result has to be."""
import json
from pathlib import Path

import torch
from safetensors import safe_open

VECTORS = Path(__file__).parents[1] / 'data' / 'official_vectors'

# Relative Frobenius error. Measured on all vectors and backends: output 1.4e-6, input gradient 2.2e-6, weights'
# gradients 2.7e-6, one-dimensional gradients 2.4e-6 (of the norm of their convolution's weight gradient).
TOLERANCE = 1e-5


def load(name):
    with safe_open(VECTORS / f'{name}.safetensors', 'pt') as f:
        return f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  not iterable otherwise


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def close(a, b, norm=None):
    """Whether a is b up to the tolerance, which is of the norm of b or of another tensor; all zeros want zeros."""
    with torch.no_grad():
        return bool((a - b).norm() <= TOLERANCE * (b if norm is None else norm).norm())


def mini_backbone():
    meta, tensors = load('mini_backbone')
    return json.loads(meta['timm_resnet_kwargs']), part(tensors, 'state.'), tensors


def assert_features(features, tensors):
    assert len(features) == 4
    for i, feature in enumerate(features):
        assert close(feature, tensors[f'io.feature{i}']), i  # measured 3.4e-7
