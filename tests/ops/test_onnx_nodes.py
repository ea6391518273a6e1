"""Nodes of ONNX as operators of torch: they compute what they say, and say the shape that it has."""
import pytest
import torch

from fadc_timm.ops import onnx_nodes

pytestmark = pytest.mark.skipif(not hasattr(torch.onnx, 'ops'), reason='nodes of ONNX: from torch 2.8 on')

CASES = {
    'Mul': ((2, 1, 3), (4, 1)), 'MatMul': ((5, 3, 2), (4, 1, 2, 6)), 'GridSample': ((2, 3, 4, 5), (2, 6, 7, 2)),
    'Clip': ((2, 3), (), ())}


@pytest.mark.parametrize('name', CASES)
def test_nodes(name):
    torch.manual_seed(0)
    attributes = dict(mode='bilinear', padding_mode='zeros', align_corners=0) if name == 'GridSample' else {}
    operator = getattr(torch.ops.onnx, name)
    torch.library.opcheck(
        getattr(operator, f'opset{onnx_nodes.OPSET}'), [torch.randn(shape) for shape in CASES[name]], attributes,
        test_utils=('test_schema', 'test_faketensor'))


def test_functions(monkeypatch):
    """They give the same while a graph for ONNX is made."""
    torch.manual_seed(0)
    a, b, grid = torch.randn(3, 4), torch.randn(2, 4, 5), torch.rand(2, 6, 7, 2)

    def results():
        return (onnx_nodes.clamp(a, -0.5, 0.5), onnx_nodes.matmul(a, b), onnx_nodes.multiply(a, b[:, :, :1].mT),
                onnx_nodes.grid_sample(b[:, None], grid))

    expected = results()
    assert torch.equal(expected[0], a.clamp(-0.5, 0.5))
    monkeypatch.setattr(onnx_nodes, 'makes_onnx', lambda x: True)
    for y, z in zip(results(), expected):
        assert torch.equal(y, z)


def test_operators_that_torch_has():
    """They are left as they are, and the function is called."""
    function = onnx_nodes._node('Mul', lambda a, b: [])(torch.mul)
    assert function is torch.mul
