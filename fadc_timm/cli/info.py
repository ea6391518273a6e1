"""`fadc-timm info`: versions, devices, and which backend runs where."""
import argparse
import os
import platform
import warnings
from typing import Any

import timm
import torch

from ._common import CommandError

__all__ = ['add_parser']


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        return f'{gpu.name}, {gpu.total_memory / 2 ** 30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}'
    name = platform.processor() or platform.machine()
    if 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', {}):
        name += f', {os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30:.1f} GiB'
    return f'{name}, {torch.get_num_threads()} threads' if device.type == 'cpu' else name


def _info(args: argparse.Namespace) -> int:
    import torchvision

    from .. import __version__
    from ..ops import band_mix
    from ..ops.sampled_conv.arguments import NO_GAINS, ConvArgs
    from ..ops.sampled_conv.backends import BACKENDS, choose_backend
    from ..ops.settings import named_backend, workspace_bytes
    from ..ops.triton_support import unavailable
    why_no_triton = unavailable()
    if why_no_triton is None:
        import triton
        why_no_triton = f'triton {triton.__version__}'
    print(f'fadc_timm {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, '
          f'timm {timm.__version__}, Python {platform.python_version()}\n{why_no_triton}')
    try:
        named, megabytes = named_backend(), workspace_bytes() // 2 ** 20
    except ValueError as e:
        raise CommandError(str(e)) from e
    print(f'backend for calls that name none: {named or "by device, dtype and shape"}; '
          f"workspace of 'triton': {megabytes} MB")
    devices = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
    for device in map(torch.device, devices + ['mps'] * torch.backends.mps.is_available()):
        x = torch.zeros(1, 2, 1, 1, device=device)
        dense, depthwise = (
            ConvArgs(x, x.new_zeros(2, 2 // groups, 3, 3), x.new_ones(1, 1, 1, 1), None, None, NO_GAINS, (1, 1), (1, 1),
                     groups) for groups in (1, 2))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a default that cannot run: the reason is printed below
            chosen = named or choose_backend(dense), named or choose_backend(depthwise), band_mix.choose_backend(x)
        print(f'\n{device}: {_device_name(device)}\n'
              f'  convolution: {chosen[0]}; depthwise: {chosen[1]}; band mix: {chosen[2]}')
        for name, backend in BACKENDS.items():
            reason = backend.why_not(dense)
            print(f'  {name}: {"runs" if reason is None else f"cannot run: {reason}"}')
    return 0


def add_parser(commands: Any) -> None:
    p = commands.add_parser(
        'info', help='versions, devices, and which backend runs where',
        description='Print versions and settings; and for each device its name and memory, the backends that are '
                    'chosen there, and why others cannot run there.')
    p.set_defaults(run=_info)
