"""Publishing: the model card, and the push of a folder to the Hub."""
from .card import Base, Built, HubConfig, Metric, build_card
from .folder_card import folder_card
from .push import Pushed, Refused, push_folder, uploads

__all__ = [
    'Base', 'Built', 'HubConfig', 'Metric', 'Pushed', 'Refused', 'build_card', 'folder_card', 'push_folder',
    'uploads']
