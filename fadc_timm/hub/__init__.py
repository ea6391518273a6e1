"""Publishing: configurations, folders, model cards, and the push to the Hub."""
from ..checkpoints.folder import fixed_input, fixed_logits, is_model_folder, reload, write_folder
from .build import Built, Refused, build, format_logits, sample_logits, verify, why_not
from .card import build_card
from .config import Base, ConfigError, HubConfig, Metric, check_config, parse_config, read_config
from .push import Pushed, push_folder, uploads

__all__ = [
    'Base', 'Built', 'ConfigError', 'HubConfig', 'Metric', 'Pushed', 'Refused', 'build', 'build_card', 'check_config',
    'fixed_input', 'fixed_logits', 'format_logits', 'is_model_folder', 'parse_config', 'push_folder', 'read_config',
    'reload', 'sample_logits', 'uploads', 'verify', 'why_not', 'write_folder']
