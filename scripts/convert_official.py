#!/usr/bin/env python3
"""Convert an mmsegmentation checkpoint of the authors to a folder that `timm.create_model('local-dir:DIR')` loads.

    python scripts/convert_official.py upernet_r50_fadc.pth --model resnet50c_fadc --out converted/resnet50c_fadc

The folder holds config.json and model.safetensors of the backbone, without a classifier.
"""
import argparse
import json
import logging
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

import timm
import torch
from timm.models import PretrainedCfg
from timm.utils import ParseKwargs

from fadc_timm.official import convert_checkpoint

_logger = logging.getLogger('convert_official')

# The dilation's activation in the authors' two releases.
RELEASES = {'december2024': 'abs', 'april2024': 'relu'}


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Tensors of a .pth or .safetensors file, without running code that a pickle may contain."""
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file
        return load_file(path)
    return torch.load(path, map_location='cpu', weights_only=True)


def write_folder(
        model: torch.nn.Module,
        pretrained_cfg: Dict[str, Any],
        model_args: Dict[str, Any],
        out: Path,
) -> None:
    """Write timm's folder under a temporary name beside its place, then put it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    try:
        timm.models.save_for_hf(
            model, str(temporary / 'new'), model_config=dict(pretrained_cfg=pretrained_cfg),
            model_args=model_args, safe_serialization=True)
        config_file = temporary / 'new' / 'config.json'
        content = json.loads(config_file.read_text())
        # timm repeats it beside the entry that counts, and transformers' wrapper then passes it twice
        content.get('model_args', {}).pop('num_classes', None)
        config_file.write_text(json.dumps(content, indent=2))
        if out.exists():
            out.rename(temporary / 'old')
        (temporary / 'new').rename(out)
    finally:
        shutil.rmtree(temporary)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='mmsegmentation checkpoint, .pth or .safetensors')
    parser.add_argument('--model', default='resnet50c_fadc', help='architecture (default: %(default)s)')
    parser.add_argument('--out', type=Path, required=True, help='folder to write')
    parser.add_argument('--release', choices=sorted(RELEASES), default='december2024',
                        help='release of the code that trained it (default: %(default)s)')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs,
                        help='more arguments of the model, such as fadc_stages="(False, False, True, True)"')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')

    model_args = dict(padding_mode='replicate', dilation_act=RELEASES[args.release], **args.model_kwargs)
    try:
        if not args.checkpoint.is_file():
            raise FileNotFoundError(f'There is no checkpoint {args.checkpoint}.')
        if args.out.exists() and not (args.out / 'config.json').is_file():
            raise FileExistsError(f'{args.out} exists and is no folder of a model.')
        model = timm.create_model(args.model, num_classes=0, **model_args)
        model.load_state_dict(convert_checkpoint(read_checkpoint(args.checkpoint), model))
        # the authors' backbones see images normalised as timm's default does, at mmsegmentation's crop size
        default_cfg = timm.models.get_pretrained_cfg(args.model) or PretrainedCfg()
        config = dict(
            default_cfg.to_dict(), num_classes=0, tag=None,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
            license=None, paper_ids='arXiv:2403.05369', origin_url='https://github.com/Linwei-Chen/FADC')
        write_folder(model, config, model_args, args.out)
    except (OSError, RuntimeError, TypeError, ValueError, NotImplementedError, pickle.UnpicklingError) as e:
        print(f'convert_official: {args.checkpoint}: {e}', file=sys.stderr)
        return 2
    _logger.info("Wrote %s: timm.create_model('local-dir:%s')", args.out, args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
