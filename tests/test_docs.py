"""README.md, docs/ and the other pages: their Python blocks run, and what they link to and name is there."""
import importlib.util
import re

import pytest
import timm

from fadc_timm.ops import set_backend
from tests.support.openmmlab import stand_in
from tests.support.processes import ROOT

PAGES = sorted(str(page.relative_to(ROOT)) for pattern in (
    'README.md', 'CONTRIBUTING.md', 'docs/*.md', 'fadc_timm/**/README.md', 'scripts/README.md', 'tests/README.md')
    for page in ROOT.glob(pattern))
OPTIONAL = ('onnx', 'onnxscript', 'peft', 'segmentation_models_pytorch', 'transformers')

pytestmark = pytest.mark.usefixtures('one_thread')


def without_code(text):
    return re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.*)', without_code(text), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.fixture
def offline(monkeypatch):
    """`pretrained=True` loads weights that are on this machine, and leaves out those that it would download."""
    create_model = timm.create_model

    def create(name, pretrained=False, **kwargs):
        cfg = None if ':' in name else timm.models.get_pretrained_cfg(name)
        local = name.startswith('local-dir:') or 'pretrained_cfg_overlay' in kwargs or bool(cfg and cfg.file)
        return create_model(name, pretrained=pretrained and local, **kwargs)

    monkeypatch.setattr(timm, 'create_model', create)


@pytest.mark.parametrize('page', PAGES)
def test_python_blocks(page, offline, tmp_path, monkeypatch):
    """The blocks of a page, one after the other in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names, absent = {'__name__': 'page'}, set()
    for block in re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.S | re.M):
        if 'mmcv' in block and importlib.util.find_spec('mmcv') is None:
            stand_in(monkeypatch)
        try:
            with set_backend(None):  # where there is a GPU, a page chooses another
                exec(compile(block, page, 'exec'), names)
        except ModuleNotFoundError as e:
            if e.name not in OPTIONAL:
                raise
            absent.add(e.name)
    if absent:
        pytest.skip(f'except the blocks that need {", ".join(sorted(absent))}, all ran')


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """Relative links, their anchors, and pictures."""
    path = ROOT / page
    for target in re.findall(r'\]\(([^)\s]+)\)', without_code(path.read_text())):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize('page', PAGES)
def test_names(page):
    """Modules of scripts, and files and folders by their path from the root."""
    text = (ROOT / page).read_text()
    for folder, name in re.findall(r'\bscripts\.([a-z_]+)\.([a-z_]+)', text):
        assert (ROOT / 'scripts' / folder / f'{name}.py').is_file(), f'scripts.{folder}.{name}'
    for name in re.findall(r'(?<![\w/.])(?:fadc_timm|scripts|tests|docs|hub_configs)/[\w./*-]*', text):
        if not re.search('NAME|MODULE', name):
            assert list(ROOT.glob(name.rstrip('./'))), name
