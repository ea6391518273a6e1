"""Pictures of what FADC layers do to an image: dilation maps and band weights; spectra of features and kernels.

Matplotlib is imported where a figure is drawn only: importing fadc_timm must not cost its import.
"""
from ._common import save
from .dilation import LayerRecord, StageSummary, collect, figure, summarize, table

__all__ = ['LayerRecord', 'StageSummary', 'collect', 'figure', 'save', 'summarize', 'table']
