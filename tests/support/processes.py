"""Scripts in processes of their own."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*arguments, **env):
    """Run a script with its arguments in two processes under torchrun, with one restart."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1']
    environment = {**os.environ, **env, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(
        [str(ROOT), os.environ.get('PYTHONPATH', '')])}
    # torchrun keeps one store for all restarts, where new processes find the addresses of the dead (pytorch#135712)
    environment['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], env=environment,
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def python(code, **env):
    """Run code from the root of the checkout, with Triton's kernels compiled, and give what it prints."""
    environment = {n: v for n, v in os.environ.items() if n != 'TRITON_INTERPRET'}
    return subprocess.run([sys.executable, '-c', code], env={**environment, **env}, cwd=ROOT, capture_output=True,
                          text=True, check=True).stdout


def forked(function):
    """Run a function in a copy of this process, and give the copy's exit status: negative, the signal that killed it.

    It costs no start of Python and torch. The copy must not compute gradients, for which it has no threads.
    """
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
