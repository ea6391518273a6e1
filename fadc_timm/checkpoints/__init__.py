"""What users load and save: local checkpoints, the folder of a model, and the checkpoints of the authors' code."""
from . import official
from .convert import RELEASES, Checkpoint, Converted, convert, read_checkpoint
from .folder import check_cfg, fixed_input, fixed_logits, is_model_folder, reload, write_folder
from .saved import load, load_checkpoint, save

__all__ = [
    'RELEASES', 'Checkpoint', 'Converted', 'check_cfg', 'convert', 'fixed_input', 'fixed_logits', 'is_model_folder',
    'load', 'load_checkpoint', 'official', 'read_checkpoint', 'reload', 'save', 'write_folder']
