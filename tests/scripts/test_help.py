"""`--help` of every script, on a machine that has what the package needs and nothing else."""
import subprocess
import sys

from tests.support.processes import ROOT

SCRIPTS = sorted('.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in (ROOT / 'scripts').glob('*/*.py')
                 if "__name__ == '__main__'" in path.read_text())
HELP = """
import contextlib, io, runpy, sys
for name in ('pytest', 'pycocotools', 'scipy', 'segmentation_models_pytorch', 'sklearn', 'skimage', 'fvcore',
             'hypothesis'):
    sys.modules[name] = None
for script in sys.argv[1:]:
    sys.argv = [script, '--help']
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(script, run_name='__main__', alter_sys=True)
        print(script, 'did not end')
    except SystemExit as e:
        if e.code or 'usage: ' not in out.getvalue():
            print(script, 'ended with', e.code)
    except BaseException as e:
        print(script, repr(e))
"""


def test_help():
    assert 'scripts.checks.works_with' in SCRIPTS and len(SCRIPTS) > 10
    run = subprocess.run([sys.executable, '-c', HELP, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ''), run.stdout + run.stderr
