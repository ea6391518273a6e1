#!/usr/bin/env python3
"""Build the folders of models as the Hub gets them, check them, and publish them if told to.

    python -m scripts.publish.push_to_hub hub_configs/test_resnet_fadc.bluemarble_climate.yaml
    python -m scripts.publish.push_to_hub hub_configs/*.yaml --org ORG --push

Without --push nothing leaves this machine: the folder is built and loaded again, its logits are compared with those in
the configuration, and what would be uploaded is printed. A model is refused if its licence does not grant
redistribution, or if the expected logits do not come out. The token is that of `hf auth login` or of HF_TOKEN.

Exit status: 0, or 1 where a model was refused, or 2 where a configuration is wrong (then nothing is done at all).
"""
import argparse
import sys
import tempfile
from pathlib import Path

import fadc_timm  # noqa: F401  registers the models
from fadc_timm.checkpoints import is_model_folder, write_folder
from fadc_timm.hub import HubConfig, Refused, build_card, push_folder, uploads
from fadc_timm.models._download import file_sha256
from scripts.publish.build import build, format_logits, sample_logits, verify, why_not
from scripts.publish.config import ConfigError, read_config


def prepare(config: HubConfig, folder: Path, push: bool) -> None:
    """Build and verify a folder, and print what is in it. What can be refused before a download is."""
    reason = why_not(config)
    if reason and not reason.startswith('expected_logits'):
        raise Refused(reason)
    if reason and push:
        raise Refused(f'{reason}. Without --push they are printed')
    if folder.exists() and not is_model_folder(folder):
        raise Refused(f'{folder} exists and is no folder of a model')
    built = build(config)
    if built.base:
        print(f'  base: {built.base.repository} at {built.base.revision}, sha256 {built.base.sha256}')
        print(f"  logits against the base's: {built.error:.1e}, relative")
    if reason:
        raise Refused(f'{reason}. They are:\nexpected_logits: {format_logits(sample_logits(built.logits))}')
    write_folder(
        built.model, folder, model_args=config.model_args, card=build_card(config, built),
        check=lambda new: verify(new, built, config))
    print('  loaded again: the expected logits came out')
    for path in uploads(folder):
        print(f'  {path.name}: {path.stat().st_size} bytes, sha256 {file_sha256(path)}')


def publish(config: HubConfig, folder: Path, update_card: bool) -> None:
    """Push a folder, and print what happened."""
    pushed = push_folder(folder, config.repository, update_card=update_card)
    print(f'  pushed {", ".join(pushed.uploaded)}: {pushed.url}')
    if 'README.md' not in pushed.uploaded:
        print('  the card that was there stays; --update-card replaces it')
    if pushed.other:
        print(f'  the repository also has: {", ".join(pushed.other)}')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG', help='files of hub_configs/')
    parser.add_argument('--org', help="publish under this owner instead of the configuration's")
    parser.add_argument('--push', action='store_true', help='publish; without it nothing is sent')
    parser.add_argument('--update-card', action='store_true', help='replace a card that the repository already has')
    parser.add_argument('--out', type=Path, help='keep the folders here, by the names of the models')
    args = parser.parse_args(argv)

    try:
        configs = [read_config(path) for path in args.configs]
    except (OSError, ConfigError) as e:
        print(f'push_to_hub: {e}', file=sys.stderr)
        return 2
    if args.org:
        configs = [c._replace(repository=f'{args.org}/{c.model}') for c in configs]
    status = 0
    with tempfile.TemporaryDirectory() as temporary:
        for config in configs:
            folder = (args.out or Path(temporary)) / config.model
            print(f'{config.model} -> {config.repository}', flush=True)
            try:
                prepare(config, folder, args.push)
                if args.push:
                    publish(config, folder, args.update_card)
                else:
                    print('  nothing was sent: without --push')
            except (Refused, OSError) as e:  # the client's HTTP errors are OSErrors
                print(f'push_to_hub: {config.model}: {e}', file=sys.stderr)
                status = 1
    return status


if __name__ == '__main__':
    sys.exit(main())
