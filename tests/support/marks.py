"""Marks of tests."""
import pytest
import torch

needs_dynamo = pytest.mark.skipif(
    not hasattr(torch.compiler, 'is_exporting'),
    reason='in one graph: dynamo before torch 2.7 cannot follow the properties of a named tuple')
