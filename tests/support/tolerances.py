"""How far a backend of the operator may be from the oracle, for each dtype and each result.

The errors beside the tolerances come from `python -m tests.support.cases`, with 300 too.
"""
from typing import Dict

import torch

# Relative Frobenius error against the float64 oracle on the same (rounded) inputs, and beside it the largest error
# measured, of all backends, on `CASES` and on 300 random cases (those with offsets without Triton, whose interpreter
# would take hours). `gain` is each of the four. In half precision `gather` and `grid_sample` round the sample of
# every tap, and `gather` adds up the gradient of x in that precision, one addend for each corner of a tap.
# `op_checks.check` tolerates what one rounding of the dilation makes beside these.
TOLERANCES: Dict[torch.dtype, Dict[str, float]] = {
    torch.float32: {
        'out': 1.2e-6,  # 4.7e-7, 1.0e-6
        'x': 1.5e-6,  # 8.3e-7, 1.3e-6
        'weight': 2e-6,  # 8.2e-7, 1.7e-6
        'bias': 1e-7,  # 0, 0
        'dilation': 1.5e-6,  # 4.9e-7, 7.3e-7
        'offset': 1.5e-6,  # 4.6e-7, 9.4e-7
        'mask': 1.5e-6,  # 7.8e-7, 1.1e-6
        'gain': 2.5e-6,  # 1.8e-6, 1.9e-6
    },
    torch.float64: {
        'out': 2.5e-15,  # 6.6e-16, 1.5e-15
        'x': 2.5e-15,  # 1.2e-15, 1.7e-15
        'weight': 3e-15,  # 1.4e-15, 2.3e-15
        'bias': 1e-16,  # 0, 0
        'dilation': 2.5e-15,  # 7.7e-16, 1.1e-15
        'offset': 2.5e-15,  # 6.7e-16, 1.3e-15
        'mask': 3e-15,  # 1.3e-15, 1.5e-15
        'gain': 4e-15,  # 1.5e-15, 2.7e-15
    },
    torch.bfloat16: {
        'out': 1.5e-2,  # 7.4e-3, 1.0e-2
        'x': 2e-2,  # 1.1e-2, 1.3e-2
        'weight': 2e-2,  # 7.5e-3, 1.2e-2
        'bias': 5e-3,  # 3.7e-3, 3.2e-3
        'dilation': 2.5e-2,  # 1.6e-2, 8.4e-3
        'offset': 2.5e-2,  # 4.6e-3, 1.0e-2
        'mask': 1.5e-2,  # 6.7e-3, 7.8e-3
        'gain': 2.5e-2,  # 1.7e-2, 1.4e-2
    },
    torch.float16: {
        'out': 2e-3,  # 9.2e-4, 1.2e-3
        'x': 2.5e-3,  # 1.7e-3, 1.8e-3
        'weight': 2.5e-3,  # 1.4e-3, 1.4e-3
        'bias': 5e-4,  # 0, 3.6e-4
        'dilation': 2.5e-3,  # 1.5e-3, 1.5e-3
        'offset': 2.5e-3,  # 5.4e-4, 9.0e-4
        'mask': 1.5e-3,  # 7.4e-4, 8.7e-4
        'gain': 4e-3,  # 2.2e-3, 2.4e-3
    },
}
