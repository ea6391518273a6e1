"""The shell blocks of README.md, docs/ and the other pages: bash reads them, and each of their commands runs.

Where a command is for other machines, hours or a network, its script still parses its options; `PARSED` says which.
"""
import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import metadata

import numpy as np
import pytest
import timm
import torch

from fadc_timm import cli
from tests.support import detection_cases, openmmlab, segmentation_cases
from tests.support.hub_client import script
from tests.support.hub_server import TOKEN
from tests.support.processes import ROOT
from tests.test_docs import PAGES, offline  # noqa: F401  a fixture

# the folder of a checkout of timm, whose packages lack its scripts
TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS')

# What is added to a command so that it is done in seconds.
_TRAINING = ('--steps', '2', '--batch', '2', '--device', 'cpu', '--threads', '1')
SHORTENED = {
    'scripts.segmentation.train': (*_TRAINING, '--crop', '64', '--decoder-channels', '8'),
    'scripts.detection.train': (*_TRAINING, '--short', '64', '--long', '96', '--fpn-channels', '8'),
}
PARSED = {
    'scripts.bench': 'minutes on a quiet machine, or a GPU; it writes into scripts/results',
    'scripts.checks': 'it writes into the pages, or runs tests',
    'scripts.segmentation.compare': 'hours',
    'scripts.studies': 'hours, and downloads',
    'torchrun': 'eight GPUs',
}
NEEDS = {'scripts.segmentation.train': 'segmentation_models_pytorch', 'scripts.detection.train': 'pycocotools'}


class Parsed(Exception):
    """A command whose options were parsed."""


def commands_of(page, tmp_path):
    """The commands of a page's shell blocks, each a list of words, as bash reads them."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('fadc-timm', 'pip', 'pytest', 'python', 'ruff', 'mypy', 'torchrun', 'git'):
        program = programs / name
        program.write_text(f'#!{sys.executable} -S\nimport json, sys\nprint(json.dumps([{name!r}, *sys.argv[1:]]))\n')
        program.chmod(0o755)
    blocks = re.findall(r'^```sh\n(.*?)^```', (ROOT / page).read_text(), re.S | re.M)
    done = subprocess.run(['bash', '-eu', '-c', ''.join(blocks)], capture_output=True, text=True, cwd=tmp_path,
                          env={'PATH': f'{programs}:/usr/bin:/bin'})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Shop:
    """A folder with what the pages take as given, and what runs a command there."""

    def __init__(self, folder, monkeypatch, request):
        self.folder, self.monkeypatch, self.request = folder, monkeypatch, request
        self.absent = set()
        monkeypatch.chdir(folder)
        (folder / 'hub_configs').symlink_to(ROOT / 'hub_configs')

    def give(self, name):
        """Make the file or folder that a word of a command names, if it is one of those that a reader has."""
        if name == 'DIR' and not (self.folder / name).exists():
            segmentation_cases.write_folder(self.folder / name)
            detection_cases.write_folder(self.folder / name)
        elif name in ('DATA', 'DATA/val') and not (self.folder / 'DATA').exists():
            rng = np.random.default_rng(0)
            for split in ('train', 'val'):
                for i in range(32):
                    picture = rng.integers(0, 60, (72, 64, 3), dtype=np.uint8) + np.uint8(40 * (i % 4))
                    segmentation_cases.put(self.folder / 'DATA' / split / f'class{i % 4}' / f'{i}.png', picture)
        elif name == 'IMAGES':
            for i in range(2):
                segmentation_cases.put(self.folder / name / f'{i}.png', segmentation_cases.picture_of(i, 48, 64))
        elif re.fullmatch(r'[\w-]+\.pth(\.tar)?', name) and not (self.folder / name).exists():
            torch.save(self.checkpoint(name), self.folder / name)
        elif name == 'names.txt':
            (self.folder / name).write_text(''.join(f'class {i}\n' for i in range(1000)))
        elif name == 'about.md':
            (self.folder / name).write_text('Trained on a roof.\n')
        elif name == 'tuned' and not (self.folder / name).exists():
            import fadc_timm
            fadc_timm.save(timm.create_model('test_resnet_fadc', num_classes=3), name)

    @staticmethod
    def checkpoint(name):
        """A checkpoint with random weights, as who makes files of that name writes it."""
        if name == 'model_best.pth.tar':
            return dict(arch='resnet50_fadc', epoch=3, state_dict=timm.create_model('resnet50_fadc').state_dict())
        if name == 'upernet_r50_fadc.pth':
            state = timm.create_model('resnet50c_fadc', features_only=True).state_dict()
            return dict(meta=dict(iter=40), state_dict={
                **{f'backbone.timm_model.{k}': v for k, v in state.items()}, 'decode_head.weight': torch.zeros(3)})
        assert name in ('mask_rcnn_r50_mdconv_c3-c5.pth', 'faster_rcnn_r50_dconv_c3-c5.pth')
        return openmmlab.checkpoint(openmmlab.backbone('resnet50', modulated='mdconv' in name))

    def run(self, words):
        for word in words:
            self.give(word)
        program, *args = words
        if program == 'pip':
            self.pip(args)
        elif program == 'fadc-timm':
            self.fadc_timm(args)
        elif program == 'python' and args[0] == '-m':
            self.module(args[1], args[2:])
        elif program == 'python':
            self.timm_script(args)
        elif program == 'torchrun':
            self.torchrun(args)
        else:
            assert program in ('pytest', 'ruff', 'mypy', 'git'), program

    def pip(self, args):
        """Extras that are there; nothing is installed."""
        assert args[:2] == ['install', '-e']
        _, _, asked = args[2].removesuffix(']').partition('[')
        assert set(filter(None, asked.split(','))) <= set(metadata('fadc_timm').get_all('Provides-Extra')), args

    def fadc_timm(self, args):
        if args[0] == 'run':
            self.timm_script(args[1:], before=('-m', 'fadc_timm', 'run'))
        elif args[0] == 'push':
            self.with_hub('fadc_timm.cli', args)
        else:
            assert cli.main(args) == 0

    def with_hub(self, module, args):
        """Run a module in the process whose Hub is on this machine."""
        client = self.request.getfixturevalue('client')
        client.call(os.chdir, str(self.folder))
        done = client.call(script, module, *args, token=TOKEN)
        assert done['status'] == 0, done['out']

    def module(self, name, args):
        if any(name.startswith(prefix) for prefix in PARSED):
            self.parse(name, args)
        elif name == 'scripts.publish.push_to_hub':
            self.with_hub(name, args)
        elif name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            self.absent.add(NEEDS[name])
        else:
            own = {arg.partition('=')[0] for arg in args}
            shortened = () if own & {'--eval', '--check-data'} else SHORTENED[name]
            assert importlib.import_module(name).main([*args, *shortened]) == 0

    def parse(self, name, args):
        module = importlib.import_module(name)
        parse_args = argparse.ArgumentParser.parse_args

        def stop(parser, *given):
            parse_args(parser, *given)
            raise Parsed

        with self.monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(sys, 'argv', [name, *args])
            patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
            module.main()

    def timm_script(self, args, before=()):
        if TIMM_SCRIPTS is None:
            self.absent.add("timm's scripts (TIMM_SCRIPTS)")
            return
        with contextlib.suppress(FileExistsError):
            for path in [p for p in os.scandir(TIMM_SCRIPTS) if p.name.endswith('.py')]:
                (self.folder / path.name).symlink_to(path.path)
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
            [str(ROOT), os.environ.get('PYTHONPATH', '')])}
        done = subprocess.run([sys.executable, *before, *args], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]

    def torchrun(self, args):
        from torch.distributed import run
        options = run.parse_args(args)
        if options.module:
            self.parse(options.training_script, options.training_script_args)
        else:
            assert options.no_python and [options.training_script, options.training_script_args[0]] == [
                'fadc-timm', 'run']


@pytest.mark.timeout(1800)  # with timm's scripts, which train
@pytest.mark.usefixtures('one_thread', 'offline')
@pytest.mark.parametrize('page', [page for page in PAGES if '```sh\n' in (ROOT / page).read_text()])
def test_shell_blocks(page, tmp_path, monkeypatch, request):
    """The blocks of a page, one after the other in one folder."""
    commands = commands_of(page, tmp_path)
    shop = Shop(tmp_path, monkeypatch, request)
    for words in commands:
        shop.run(words)
    if shop.absent:
        pytest.skip(f'except the commands that need {", ".join(sorted(shop.absent))}, all ran')
