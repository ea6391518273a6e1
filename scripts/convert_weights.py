#!/usr/bin/env python3
"""Lift a local checkpoint to an FADC model, in a folder for `timm.create_model('local-dir:DIR', pretrained=True)`.

    python scripts/convert_weights.py resnet50_a1_0-14fe96d1.pth --model resnet50_fadc.a1_in1k --out lifted
    python scripts/convert_weights.py output/train/model_best.pth.tar --model resnet50_fadc --out tuned
    python scripts/convert_weights.py upernet_r50_fadc.pth --model resnet50c_fadc --out converted

SOURCE is a checkpoint of timm's base or FADC model (.safetensors, or a pickle such as timm's train script writes, of
which the averaged weights are taken), of mmsegmentation or segmentation_models_pytorch with such a backbone, or an
mmsegmentation checkpoint of the authors' code. Every key is accounted for:
taken (with its name in the model), added (at its initial value: FADC as the identity), left. A model name with a tag
says that the weights are that tag's, and its licence and labels go into config.json; without one only its
preprocessing does.

Exit status: 0, or 2 where the checkpoint cannot be converted; the folder that was there is then as it was.
"""
import argparse
import sys
from pathlib import Path
from typing import List, Optional

import torch
from timm.utils import ParseKwargs

from fadc_timm import hub
from fadc_timm.hub.convert import RELEASES, Checkpoint, Converted, convert, pretrained_cfg, read_checkpoint


def report(checkpoint: Checkpoint, converted: Converted) -> List[str]:
    """A line for each key, then their numbers."""
    lines = []
    for key, sources in converted.taken.items():
        source = ' + '.join(sources)
        lines.append(f'taken  {source}' + (f' -> {key}' if source != key else ''))
    lines += [f'added  {key}' for key in converted.added]
    left = [*converted.left, *checkpoint.left]
    lines += [f'left   {key}' for key in left]
    kind = "the authors' code" if checkpoint.official else 'timm'
    under = f' under {checkpoint.entry!r}' if checkpoint.entry else ''
    lines.append(f'A checkpoint of {kind}{under}: {len(converted.taken)} tensors of the model from {kind}, '
                 f'{len(converted.added)} added at their initial values; {len(left)} entries of the file left.')
    return lines


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, metavar='SOURCE', help='.safetensors, .pth, .pth.tar, .bin')
    parser.add_argument('--model', required=True, metavar='NAME', help='<arch>_fadc or <arch>_fadc.<tag>')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write')
    parser.add_argument('--no-ema', action='store_true', help='the weights themselves, where there are averaged ones')
    parser.add_argument('--release', choices=sorted(RELEASES),
                        help="of the authors' code, for their checkpoints (default: december2024)")
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE',
                        help='more arguments of the model, such as fadc_stages="(False, False, True, True)"')
    args = parser.parse_args(argv)

    try:
        if args.out.exists() and not hub.is_model_folder(args.out):
            raise FileExistsError(f'{args.out} exists and is no folder of a model.')
        checkpoint = read_checkpoint(args.source, use_ema=not args.no_ema)
        if args.release and not checkpoint.official:
            raise ValueError("--release is for checkpoints of the authors' code, and this is none")
        converted = convert(checkpoint, args.model, args.model_kwargs, args.release or 'december2024')
        size = tuple(converted.model.pretrained_cfg['input_size'])  # type: ignore[index]  # a dictionary, not a module
        size = (converted.model_args.get('in_chans', size[0]), *size[1:])

        def check(folder: Path) -> None:
            a, b = (hub.fixed_logits(model, size) for model in (converted.model, hub.reload(folder)))
            if not torch.equal(a, b):
                raise RuntimeError('loaded again, the model computes something else')

        cfg = pretrained_cfg(args.model, checkpoint.official)
        hub.write_folder(converted.model, args.out, pretrained_cfg=cfg, model_args=converted.model_args, check=check)
    except (OSError, RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        print(f'convert_weights: {args.source}: {e}', file=sys.stderr)
        return 2
    print('\n'.join(report(checkpoint, converted)))
    print(f"Wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0


if __name__ == '__main__':
    sys.exit(main())
