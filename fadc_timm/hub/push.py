"""Publishing a folder on the Hub, in one commit."""
from pathlib import Path
from typing import List, NamedTuple, Optional, Union

from huggingface_hub import HfApi

from ..checkpoints.folder import CARD, CONFIG, WEIGHTS
from ..models._download import file_sha256

__all__ = ['Pushed', 'Refused', 'push_folder', 'uploads']


class Refused(RuntimeError):
    """A model that may not be published as it is; the message says why."""


class Pushed(NamedTuple):
    """What :func:`push_folder` did.

    commit: The id of the new commit, or of the previous one if nothing changed.
    url: The address of the commit.
    uploaded: Names of the files that were sent.
    other: Names of the repository's other files.
    """
    commit: str
    url: str
    uploaded: List[str]
    other: List[str]


def uploads(folder: Union[str, Path]) -> List[Path]:
    """The three files of a folder that are published: the card, the configuration and the weights.

    Raises:
        Refused: The folder has other files, or lacks one of the three.
    """
    wanted = {CARD, CONFIG, WEIGHTS}
    there = {p.name for p in Path(folder).iterdir()}
    if there != wanted:
        raise Refused(f'{folder}: wanted {", ".join(sorted(wanted))}, got {", ".join(sorted(there)) or "nothing"}')
    return [Path(folder, name) for name in sorted(wanted)]


def push_folder(
        folder: Union[str, Path],
        repository: str,
        *,
        update_card: bool = False,
        private: Optional[bool] = None,
) -> Pushed:
    """Publish a folder: create the repository if it is not there, and add all files in one commit.

    The files are uploaded first, and the commit makes them visible: an interrupted push publishes nothing. The commit
    names its parent, so it fails if somebody else committed in between. The token is the one of huggingface_hub (`hf
    auth login` or HF_TOKEN).

    Args:
        folder: A folder with config.json, model.safetensors and README.md.
        repository: `owner/name`.
        update_card: Replace a README.md that is already there.
        private: Whether a new repository is private; by default as the owner's settings say.

    Raises:
        Refused: The folder is not complete, or the repository does not hold what was sent.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused the push, or could not be reached.
    """
    files = uploads(folder)
    api = HfApi(library_name='fadc_timm')
    api.create_repo(repository, private=private, exist_ok=True)
    if api.file_exists(repository, CARD) and not update_card:
        files = [path for path in files if path.name != CARD]
    names = [path.name for path in files]
    parent = api.model_info(repository).sha
    try:
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message='Add model',
            parent_commit=parent)
    except RuntimeError as e:  # huggingface_hub names the file, and the cause says what happened to it
        raise Refused(f'{repository}: {e} {e.__cause__ or ""}'.rstrip()) from e
    info = api.model_info(repository, revision=commit.oid, files_metadata=True)
    remote = {s.rfilename: s for s in info.siblings or ()}
    for path in files:
        sibling = remote.get(path.name)
        lfs = sibling.lfs if sibling else None
        if sibling is None or sibling.size != path.stat().st_size or (lfs and lfs.sha256 != file_sha256(path)):
            raise Refused(f'{repository}: after the commit {commit.oid} its {path.name} is not the one that was sent')
    other = sorted(set(remote) - {CARD, CONFIG, WEIGHTS, '.gitattributes'})
    return Pushed(commit.oid, commit.commit_url, names, other)
