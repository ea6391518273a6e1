"""Pictures of what FADC layers do to an image: dilation maps and band weights; spectra of features and kernels.

Only the functions that draw import matplotlib, so that importing fadc_timm does not take longer.
"""
from ._common import save
from .dilation import LayerRecord, StageSummary, all_constant, collect, figure, summarize, table
from .images import read_image, to_rgb
from .spectrum import (
    LayerSpectra,
    all_unchanged,
    collect_spectra,
    first_of_stages,
    spectrum_figure,
    spectrum_table,
)

__all__ = [
    'LayerRecord', 'LayerSpectra', 'StageSummary', 'all_constant', 'all_unchanged', 'collect', 'collect_spectra',
    'figure', 'first_of_stages', 'read_image', 'save', 'spectrum_figure', 'spectrum_table', 'summarize', 'table',
    'to_rgb']
