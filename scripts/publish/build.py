"""From a configuration to a folder that is ready to be published."""
import math
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from fadc_timm.checkpoints.folder import WEIGHTS, fixed_logits, reload
from fadc_timm.hub import Base, Built, HubConfig, Refused
from fadc_timm.models._download import file_sha256
from fadc_timm.models._family import architecture_of
from scripts.publish.config import REDISTRIBUTABLE

__all__ = ['build', 'format_logits', 'sample_logits', 'verify', 'why_not']

# Relative error (2-norm) of logits on the fixed input. Of the published model against those in its configuration:
# between this project's backends 1.3e-7 (default model). Of lifted weights against the base: 1e-3 is what
# docs/weights.md promises.
SAME, LOSSLESS = 2e-5, 1e-3
STORED = 16

_WEIGHT_FILES = (WEIGHTS, 'pytorch_model.bin')


def why_not(config: HubConfig) -> str | None:
    """Why a model may not be published, or None: its licence, or that nobody wrote down its logits yet."""
    if config.licence not in REDISTRIBUTABLE:
        return (
            f'licence: {config.licence!r} does not grant redistribution for any use; those that do: '
            f'{", ".join(sorted(REDISTRIBUTABLE))}')
    if config.expected_logits is None:
        return 'expected_logits: null; the weights have to be at hand once, and their logits put there'
    return None


def sample_logits(logits: Tensor) -> Tensor:
    """At most 16 of the logits, evenly spread over the classes, as configurations keep them."""
    n = len(logits)
    return logits if n <= STORED else logits[torch.arange(STORED) * n // STORED]


def format_logits(logits: Tensor) -> str:
    """Logits for a configuration: rounding to what is written down changes less than 1e-6 of the largest."""
    decimals = max(1, 6 - math.floor(math.log10(max(logits.abs().max().item(), 1e-30))))
    return f'[{", ".join(f"{v:.{decimals}f}" for v in logits.tolist())}]'


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _size(model: nn.Module) -> tuple[int, ...]:
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a dictionary, not a module
    return tuple(cfg['input_size'])


def _found(base: Base, cache_dir: str | None) -> Base:
    """The base with the revision and the hash of what is in the cache."""
    for name in _WEIGHT_FILES:
        path = try_to_load_from_cache(base.repository, name, cache_dir=cache_dir, revision=base.revision)
        if isinstance(path, str):
            return Base(base.repository, Path(path).parent.name, file_sha256(Path(path)))
    raise Refused(f'base.repository: {base.repository} has none of {", ".join(_WEIGHT_FILES)}')


def build(config: HubConfig, cache_dir: str | None = None) -> Built:
    """Build the model of a configuration with its weights, and compare it with its base.

    Args:
        config: What to build.
        cache_dir: Of the Hub's client, where it is not the default.

    Raises:
        Refused: The base's weights are not those that the configuration names, or are not lifted without loss.
        DownloadError: The weights could not be downloaded.
    """
    def create(name: str, **kwargs: Any) -> nn.Module:
        base = config.base
        overlay = dict(hf_hub_id=f'{base.repository}@{base.revision}') if base and base.revision else None
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **kwargs)

    model = create(config.model, **config.model_args).eval()
    logits = fixed_logits(model, _size(model))
    if config.base is None:
        return Built(model, logits, None, None)
    found = _found(config.base, cache_dir)
    if config.base.sha256 not in (None, found.sha256):
        raise Refused(f'base.sha256: wanted {config.base.sha256}, {found.repository} has {found.sha256}')
    arch, _, tag = config.model.partition('.')
    registered = architecture_of(arch)
    assert registered is not None  # the configuration was checked against the registry
    plain = create(f'{registered.base}.{tag}')
    error = relative_error(logits, fixed_logits(plain, _size(model)))
    if not error < LOSSLESS:
        raise Refused(f'logits: {error:.1e} from those of {found.repository}, relative; wanted less than {LOSSLESS}')
    return Built(model, logits, found, error)


def verify(folder: str | Path, built: Built, config: HubConfig) -> None:
    """Load a folder again and compare its logits with the model's and with those in the configuration.

    Raises:
        Refused: They differ, or there are none to compare with.
    """
    logits = fixed_logits(reload(folder), _size(built.model))
    if not torch.equal(logits, built.logits):
        raise Refused(f'{folder}: loaded again, the logits differ from those of the model that was saved')
    if config.expected_logits is None:
        raise Refused('expected_logits: null')
    actual, expected = sample_logits(logits), torch.tensor(config.expected_logits)
    if len(actual) != len(expected):
        raise Refused(f'expected_logits: {len(expected)} of them, the model has {len(actual)}')
    error = relative_error(actual, expected)
    if not error < SAME:
        raise Refused(
            f'expected_logits: {error:.1e} off, relative, wanted less than {SAME}; came out: {format_logits(actual)}')

