"""The configurations in hub_configs/, and what makes others of them."""
from pathlib import Path

import yaml

import fadc_timm

ROOT = Path(fadc_timm.__file__).parents[1]
CONFIGS = sorted((ROOT / 'hub_configs').iterdir())
DEFAULT = ROOT / 'hub_configs' / 'test_resnet_fadc.bluemarble_climate.yaml'
METRIC = dict(name='top-1', value=71.5, dataset='x', of='base', image_size=224, source='x')


def changed(path=DEFAULT, **values):
    """The text of a configuration with some of its entries replaced, or left out where the value is `...`."""
    content = yaml.safe_load(path.read_text())
    content.update(values)
    return yaml.safe_dump({k: v for k, v in content.items() if v is not ...}, sort_keys=False)
