"""Processes in which the Hub's client was imported with HF_ENDPOINT at the loopback server, and what they are asked."""
import io
import logging
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional
from unittest import mock

import torch

from tests.support.hub_server import Hub


class Client:
    """One or two processes; `call` and `start` run a function of this module in one of them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        return self.pool.submit(function, *args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.start(function, *args, **kwargs).result(timeout=300)


@contextmanager
def clients(hub: Hub, home: Path, processes: int = 1, **env: str) -> Iterator[Client]:
    """Processes with a cache of their own, without Xet, which is another protocol."""
    own = dict(
        HF_ENDPOINT=hub.endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
        HF_HUB_DISABLE_PROGRESS_BARS='1', OMP_NUM_THREADS='1', NO_PROXY='127.0.0.1,localhost', **env)
    taken = [k for k in os.environ if k.startswith(('HF_', 'HUGGING')) and k not in own]
    with mock.patch.dict(os.environ, own):
        for key in taken:
            del os.environ[key]
        with ProcessPoolExecutor(processes, multiprocessing.get_context('spawn')) as pool:
            for future in [pool.submit(time.sleep, 0.01) for _ in range(processes)]:  # the processes start here
                future.result()
            yield Client(pool)


@contextmanager
def _token(token: Optional[str]) -> Iterator[None]:
    """The client reads HF_TOKEN for each request."""
    with mock.patch.dict(os.environ, {'HF_TOKEN': token} if token else {}):
        if not token:
            os.environ.pop('HF_TOKEN', None)
        yield


def load(name: str, x: Any = None, cache_dir: Optional[str] = None, token: Optional[str] = None,
         at: float = 0, **kwargs: Any) -> Dict[str, Any]:
    """Create a pretrained model: its outputs for x as an array, or the error. `at` is the time to start at."""
    import timm

    import fadc_timm
    time.sleep(max(0., at - time.time()))
    with _token(token):
        try:
            model = timm.create_model(name, pretrained=True, cache_dir=cache_dir, **kwargs).eval()
        except Exception as e:
            return dict(error=str(e), type=type(e).__name__)
    with torch.no_grad():
        y = model(torch.as_tensor(x)) if x is not None else None
    y = y[-1] if isinstance(y, list) else y
    layers = [m for m in model.modules() if isinstance(m, fadc_timm.FADConv2d)]
    options = {(m.padding_mode, m.freq_select.bands) for m in layers}
    return dict(y=None if y is None else y.numpy(), options=options, error=None)


def script(name: str, *args: str, token: Optional[str] = None) -> Dict[str, Any]:
    """Run the `main` of a script: its exit status, and all that it and what it calls said, logs of any level too."""
    import importlib
    module = importlib.import_module(name)
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with _token(token), redirect_stdout(out), redirect_stderr(out):
            status = module.main([str(a) for a in args])
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return dict(status=status, out=out.getvalue())


def execute(code: str) -> str:
    """Run code and give what it printed."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, 'card', 'exec'), {})
    return out.getvalue()
