"""The benchmark of ONNX files: a line of its table, on the smallest networks."""
import pytest

from scripts.bench import exported
from tests.support.small_model import MODEL

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.sweep]


@pytest.mark.parametrize('options', [[], ['--any-size'], ['--deform-conv']])
def test_line(options, capsys):
    for package in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(package)
    name = MODEL.removesuffix('_fadc')
    exported.main(['--models', name, '--size', '64', '--threads', '1', '--repeats', '3', *options])
    header, _, line = capsys.readouterr().out.strip().splitlines()[-3:]
    assert header.startswith('| model')
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[:2] == [f'`{name}_fadc`', 'any' if '--any-size' in options else '64']
    assert 40 < int(cells[2]) < 250 and float(cells[5]) > 1 and float(cells[9]) < 1e-4
