"""scripts.checks.works_with where pytest is not installed."""
import subprocess
import sys

from tests.support.processes import ROOT

WITHOUT = """
import sys
sys.modules['pytest'] = None
sys.argv = ['works_with', *sys.argv[1:]]
from scripts.checks.works_with import main
sys.exit(main())
"""


def run(*args):
    return subprocess.run([sys.executable, '-c', WITHOUT, *args], cwd=ROOT, capture_output=True, text=True)


def test_without_pytest():
    """Its help needs no pytest; a run says how to install it."""
    helped = run('--help')
    assert helped.returncode == 0 and 'Writes scripts/results/works_with.csv' in helped.stdout
    refused = run('-k', 'compile')
    assert refused.returncode == 1 and 'Traceback' not in refused.stderr
    assert "pytest is not installed: pip install -e '.[test,integrations]'" in refused.stderr
