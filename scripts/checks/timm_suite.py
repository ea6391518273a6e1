#!/usr/bin/env python3
"""Run timm's own tests/test_models.py against the models of this package.

The tests come from the source distribution of the timm version that is installed, downloaded once from PyPI and kept
in .suite/ beside the project. They run offline, with random weights; see timm_suite_plugin.py for what is selected.

    python -m scripts.checks.timm_suite                                   # every model: hours
    python -m scripts.checks.timm_suite resnet18_fadc 'test_*'            # some models (fnmatch patterns)
    python -m scripts.checks.timm_suite resnet18_fadc -n 2 -- -k forward  # two processes; pytest's own options after --
"""
import argparse
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import timm

from scripts.wheels import keep_folder

ROOT = Path(__file__).resolve().parents[2]


def fetch_tests(folder: Path) -> Path:
    """Return the folder with `tests/` and `pyproject.toml` of the installed timm, downloading them if need be."""
    release = f'timm-{version("timm")}'
    target = folder / release
    if target.is_dir():
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        download = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
             '--no-binary', 'timm', '--dest', tmp, release.replace('-', '==', 1)],
            stdin=subprocess.DEVNULL)
        archives = list(Path(tmp).glob('timm-*.tar.gz'))
        if download.returncode or not archives:
            sys.exit(f'error: could not download the source distribution of {release} from PyPI (pip says why above). '
                     f'Without a network, unpack its tests/ and pyproject.toml into {target}')
        # Not timm/ itself: it would be imported in place of the installed package.
        with tarfile.open(archives[0]) as tar:
            wanted = [m for m in tar if m.name.startswith(f'{release}/tests/') or m.name == f'{release}/pyproject.toml']
            tar.extractall(tmp, members=wanted, filter='data')
        keep_folder(Path(tmp) / release, target)
    return target


def main() -> int:
    args = sys.argv[1:]
    split = args.index('--') if '--' in args else len(args)
    args, pytest_args = args[:split], args[split + 1:]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', help='architectures, as fnmatch patterns (default: all of the package)')
    parser.add_argument('-n', '--workers', type=int, default=0, help='processes to run the tests in (pytest-xdist)')
    parser.add_argument('--dir', type=Path, default=ROOT / '.suite', help="where timm's tests are kept")
    options = parser.parse_args(args)

    env = dict(os.environ)
    importlib.import_module(env.setdefault('TIMM_SUITE_PKG', 'fadc_timm'))
    unknown = [pattern for pattern in options.models if not timm.list_models(pattern)]
    if unknown:  # before a download
        parser.error(f'no model matches {", ".join(unknown)}')
    suite = fetch_tests(options.dir.resolve())
    env['TIMM_SUITE_MODELS'] = ' '.join(options.models)
    env['GITHUB_ACTIONS'] = '1'  # timm's tests then leave out those that download weights, and the largest models
    env.setdefault('HF_HUB_OFFLINE', '1')  # nothing that is left may need the network
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), env.get('PYTHONPATH')]))
    command = [sys.executable, '-m', 'pytest', '-p', 'scripts.checks.timm_suite_plugin', '-p', 'no:cacheprovider',
               '-c', str(suite / 'pyproject.toml')]
    if options.workers:
        command += ['-n', str(options.workers)]
        env.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // options.workers)))
    return subprocess.call([*command, str(suite / 'tests' / 'test_models.py'), *pytest_args], env=env)


if __name__ == '__main__':
    sys.exit(main())
