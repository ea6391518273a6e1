#!/usr/bin/env python3
"""ONNX files of FADC networks against their plain ones: nodes, time of the export, time in ONNX Runtime on a CPU.

    python -m scripts.bench.exported [--models resnet18 convnext_atto] [--any-size] [--threads 2] [--deform-conv]

It prints a table; a ratio of times to run is the median of the ratios of all rounds, with their quartiles. The networks
are off the identity, as in `scripts.bench.model`. An export is timed in a process of its own, in processor time. The
difference from torch is the largest of the logits, with `--any-size` for a batch of another size too.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fadc_timm._writing import markdown_table
from fadc_timm.layers import FADC_LAYERS, FADConv2d
from scripts.bench.measure import Clock, interleave
from scripts.bench.subjects import Step, make_models
from scripts.results import quartiles

OPSET = 20


@torch.no_grad()
def export(model: nn.Module, path: Path, x: torch.Tensor, any_size: bool) -> float:
    """Write an ONNX file.

    Args:
        model: In eval mode.
        path: Of the file.
        x: Images (B, 3, H, W); with any_size at least two.
        any_size: The file takes any batch, height and width, from 33 pixels on.

    Returns:
        Seconds of processor time.
    """
    sizes: Any = None
    if any_size:
        height, width = (torch.export.Dim(name, min=33) for name in ('height', 'width'))
        sizes = ({0: torch.export.Dim('batch', max=1024), 2: height, 3: width},)
    begin = time.process_time()
    program = torch.onnx.export(
        model, (x,), dynamo=True, opset_version=OPSET, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    program.save(str(path))
    return time.process_time() - begin


def export_alone(*args: Any) -> float:
    """:func:`export` in a process of its own."""
    with ProcessPoolExecutor(1, get_context('spawn')) as process:
        return process.submit(export, *args).result()


def _runner(path: Path, x: torch.Tensor, threads: int) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # the threads of one file would keep the cores busy while the other file runs
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def compare(name: str, size: int, any_size: bool, threads: int, repeats: int, deform_conv: bool) -> list[str]:
    """A line of the table, for a base architecture."""
    import onnx

    models = {key: model.eval() for key, model in make_models(f'{name}_fadc', ('plain', 'fadc')).items()}
    layers = [m for m in models['fadc'].modules() if isinstance(m, FADC_LAYERS)]
    for layer in layers:
        if isinstance(layer, FADConv2d) and deform_conv:
            layer.backend = 'torchvision'
    x = torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        paths = {variant: Path(folder, f'{variant}.onnx') for variant in models}
        images = torch.cat([x, x]) if any_size else x
        seconds = [export_alone(models[v], paths[v], images, any_size) for v in models]
        nodes = [len(onnx.load(path).graph.node) for path in paths.values()]
        steps = {variant: _runner(path, x, threads) for variant, path in paths.items()}
        batches = [x, torch.randn(3, 3, size - 31, size + 33)] if any_size else [x]
        with torch.no_grad():
            error = max((_runner(paths['fadc'], t, threads)() - models['fadc'](t)).abs().max().item() for t in batches)
        clock = Clock('cpu')
        for step in steps.values():
            clock(step, 3)
        samples = interleave(steps, clock, repeats, 60.)
    plain, fadc = samples.values()
    ratio, low, high = quartiles([f / p for p, f in zip(plain, fadc)])
    return [f'`{name}_fadc`', 'any' if any_size else str(size), f'{(nodes[1] - nodes[0]) / len(layers):.0f}',
            f'{seconds[0]:.1f}', f'{seconds[1]:.1f}', f'{seconds[1] / seconds[0]:.1f}',
            f'{quartiles(plain)[0]:.0f}', f'{quartiles(fadc)[0]:.0f}', f'{ratio:.2f} ({low:.2f} to {high:.2f})',
            f'{error:.0e}']


HEADER = ['model', 'size', 'more nodes per layer', 'plain: export, s', 'FADC: export, s', 'ratio', 'plain: run, ms',
          'FADC: run, ms', 'ratio', 'difference from torch']


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'convnext_atto'], help='base architectures')
    parser.add_argument('--size', type=int, default=224, help='side of the image')
    parser.add_argument('--any-size', action='store_true', help='with symbolic batch, height and width')
    parser.add_argument('--threads', type=int, default=os.cpu_count(), help="ONNX Runtime's")
    parser.add_argument('--repeats', type=int, default=50)
    parser.add_argument('--deform-conv', action='store_true', help="with ONNX's DeformConv in place of GridSample")
    args = parser.parse_args(argv)
    lines = [compare(name, args.size, args.any_size, args.threads, args.repeats, args.deform_conv)
             for name in args.models]
    print(markdown_table(HEADER, lines))


if __name__ == '__main__':
    main()
