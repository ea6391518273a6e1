"""Weights from the Hub: a failed download says what was asked for, and a damaged file does not stay in the cache."""
import hashlib
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Set, Tuple, Type, Union

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import nn

from ._checkpoint import check_source

__all__ = ['DownloadError', 'build_checked', 'checked_download', 'file_sha256']

_SHA256 = re.compile('[0-9a-f]{64}')

# The base classes of the client's HTTP errors are those of the library below it, whose name depends on the version.
_NETWORK_ERRORS: Tuple[Type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)

_ALTERNATIVES = (
    "Without a network: timm.create_model('test_resnet_fadc', pretrained=True) has its weights in the package, and "
    "timm.create_model('local-dir:FOLDER', pretrained=True) loads a saved model; "
    '`fadc-timm convert SOURCE --model NAME --out DIR` makes such a folder from a checkpoint of the base.')


class DownloadError(OSError):
    """Weights could not be downloaded, or are not those that the Hub announced."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, 'rb') as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    """Why the Hub did not give a file, in one line."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, GatedRepoError):
        return f'{status}, the repository is gated: ask for access on its page, and log in (hf auth login)'
    if status == 401:
        return (
            '401, not authorised: the repository is private or gated and no valid token was sent (hf auth login); '
            'without a token the Hub may answer the same for a repository that does not exist')
    if status == 403:
        return '403, forbidden: the token has no access to the repository'
    if isinstance(error, RevisionNotFoundError):
        return f'{status}, the repository has no such revision'
    if isinstance(error, RepositoryNotFoundError):
        return f'{status}, there is no such repository'
    if status == 404:
        return '404, the repository has no such file'
    if constants.HF_HUB_OFFLINE and isinstance(error, (FileNotFoundError, ConnectionError)):
        return 'offline mode (HF_HUB_OFFLINE), and the file is not in the cache'
    if status is None and isinstance(error, FileNotFoundError):
        return f'the Hub ({constants.ENDPOINT}) cannot be reached, and the file is not in the cache'
    return ' '.join(str(error).split()) or type(error).__name__


def _blobs(folder: Path) -> Set[Path]:
    """Files of the cache that are named by their hash: those that the Hub keeps in LFS, weights among them."""
    return {p for p in folder.glob('*') if _SHA256.fullmatch(p.name)}


def _refuse_damaged(blobs: Set[Path], what: str) -> None:
    """Raise for files that are not what their name says, after taking them out of the cache."""
    damaged = {p for p in blobs if p.exists() and file_sha256(p) != p.name}
    for blob in damaged:
        for link in (blob.parent.parent / 'snapshots').rglob('*'):
            if link.is_symlink() and link.resolve() == blob.resolve():
                link.unlink()
        blob.unlink(missing_ok=True)
    if damaged:
        names = ', '.join(sorted(p.name for p in damaged))
        raise DownloadError(
            f'{what}: the file does not have the SHA-256 that the Hub announced ({names}). It was removed from the '
            'cache; the next call downloads it again.')


@contextmanager
def checked_download(cfg: PretrainedCfg, cache_dir: Union[str, Path, None] = None) -> Iterator[None]:
    """Around the creation of a pretrained model: checks what it downloads, and says what it failed to.

    The client checks sizes. We hash new files; after an error, every cached file of the repository. Otherwise a file
    that is in the cache already is not checked, as timm does.
    In caches without symbolic links (some on Windows) files do not carry their hash, and only their size is checked.

    Args:
        cfg: The configuration that is loaded; only one whose weights come from the Hub is watched.
        cache_dir: As for timm, where it is not the client's default.

    Raises:
        DownloadError: The first line says which tag was asked for, from where, and why it could not be had.
    """
    hub_id: Optional[str] = cfg.hf_hub_id
    local = cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and (cfg.file or cfg.state_dict))
    if not hub_id or local:
        yield
        return
    repository = hub_id.partition('@')[0]
    folder = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type='model'), 'blobs')
    name = '.'.join(filter(None, (cfg.architecture, cfg.tag)))
    what = f'Cannot load the weights of {name} from the Hub repository {hub_id}'
    before = _blobs(folder)
    try:
        yield
    except _NETWORK_ERRORS as e:
        raise DownloadError(f'{what}: {_reason(e)}.\n{_ALTERNATIVES}') from e
    except Exception:
        _refuse_damaged(_blobs(folder), what)
        raise
    _refuse_damaged(_blobs(folder) - before, what)


def build_checked(
        build: Callable[[bool], nn.Module],
        name: str,
        pretrained: bool,
        kwargs: Mapping[str, Any],
) -> nn.Module:
    """Build a network; one with weights only after its source and its arguments are found to be right.

    Args:
        build: Builds it, with weights or without.
        name: The architecture.
        pretrained: Load weights.
        kwargs: Arguments of the entry point.

    Raises:
        DownloadError: See :func:`checked_download`.
        FileNotFoundError: There is no such checkpoint.
        RuntimeError: The checkpoint is cut off.
    """
    if not pretrained:
        return build(False)
    cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    check_source(cfg)
    if kwargs.get('features_only'):  # timm looks at out_indices and the like only after it loaded the weights
        with torch.device('meta'):
            build(False)
    with checked_download(cfg, kwargs.get('cache_dir')):
        return build(True)
