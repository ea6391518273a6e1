#!/usr/bin/env python3
"""Fine-tune a lifted network on Blue Marble tiles with several learning rates for the parameters that FADC adds.

    python -m scripts.studies.train_default --model test_resnet  # the base, into the cache folder
    python -m scripts.studies.compare_rates

Every run starts from the same trained base, with FADC at the identity, and has the recipe of train_default.py but for
the parameter groups: those of timm's train script (weight decay for matrices and kernels only), each split in what FADC
adds and the rest. Runs of a seed see the same crops. Writes scripts/results/fadc_rates.csv.
"""

import argparse
import math
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn

import fadc_timm
from scripts.bluemarble.globe import CACHE_DIR, CLASS_NAMES, load_rasters, split_tiles
from scripts.results import RESULTS, write_csv
from scripts.studies.train_default import dilation_stats, evaluate, test_set, train
from scripts.training.optimizer import rate_groups

OUTPUT = RESULTS / 'fadc_rates.csv'
MODEL, BASE = 'test_resnet_fadc', 'test_resnet'


def lifted(base: Path) -> nn.Module:
    """The FADC model with the weights of a trained base."""
    overlay = {'file': str(base), 'num_classes': len(CLASS_NAMES)}
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=len(CLASS_NAMES))


def describe(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Mean and maximum of the dilation maps of each stage, for some held-out images."""
    stages: dict[str, list[tuple[float, float, float]]] = {}
    for layer, stats in dilation_stats(model, x).items():
        stages.setdefault(layer.partition('.')[0], []).append(stats)
    row = {}
    for stage, of_layers in stages.items():
        row[f'{stage}_mean'] = f'{sum(mean for _, mean, _ in of_layers) / len(of_layers):.3f}'
        row[f'{stage}_max'] = f'{max(high for _, _, high in of_layers):.3f}'
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--base', type=Path, help='trained base; default: that of train_default.py')
    parser.add_argument('--data', type=Path, default=CACHE_DIR, help='cache folder of the rasters')
    parser.add_argument('--output', type=Path, default=OUTPUT)
    parser.add_argument('--multipliers', type=float, nargs='+', default=[0.1, 1.0, 3.0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--last', type=int, default=40, help='the loss is the mean over so many last steps')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--warmup', type=int, default=10)
    parser.add_argument('--weight-decay', type=float, default=0.05)
    parser.add_argument('--smoothing', type=float, default=0.1)
    parser.add_argument('--clip-grad', type=float, default=2.0)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if not 0 < 2 * args.last <= args.steps:
        parser.error(f'--last wants at most half of --steps, got {args.last} of {args.steps}')
    args.log_every = args.steps - args.last  # train() gives the mean loss since the row before
    base = args.base or args.data / f'{BASE}.bluemarble_climate.safetensors'
    if not base.is_file():
        parser.error(f'no trained base at {base}: python -m scripts.studies.train_default --model {BASE}')
    torch.set_num_threads(args.threads)

    rgb, zones, _ = load_rasters(args.data)
    train_tiles, test_tiles, _ = split_tiles(zones)
    image = Image.fromarray(rgb)
    test = test_set(image, test_tiles)
    some = test[0][:: max(1, len(test[0]) // 48)]

    start = lifted(base)
    print(f'fadc_timm {fadc_timm.__version__}, {len(test[1])} held-out tiles', flush=True)
    versions = {'torch': torch.__version__, 'timm': timm.__version__}
    rows = [{'multiplier': '', 'seed': '', 'steps': '0', 'lr': '', 'batch': '', 'loss': '',
             'top1': f'{evaluate(start, *test)["top1"]:.2f}', **describe(start, some), 'finite': 'yes', **versions}]
    print(*rows[0].values(), flush=True)
    for seed in args.seeds:
        args.seed = seed  # train() takes that of the crops from here
        for multiplier in args.multipliers:
            torch.manual_seed(seed)
            model = lifted(base)
            groups = rate_groups(model, multiplier, args.weight_decay)
            log: list[dict] = []
            accuracy = train(model, image, train_tiles, test, groups, args, log.append)
            loss = float(log[-1]['loss'])
            finite = math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())
            rows.append({
                'multiplier': f'{multiplier:g}', 'seed': str(seed), 'steps': str(args.steps), 'lr': f'{args.lr:g}',
                'batch': str(args.batch_size), 'loss': f'{loss:.4f}', 'top1': f'{accuracy["top1"]:.2f}',
                **describe(model, some), 'finite': 'yes' if finite else 'no', **versions})
            print(*rows[-1].values(), flush=True)

    write_csv(args.output, list(rows[0]), rows)
    print(f'wrote {args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
