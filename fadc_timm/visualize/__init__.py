"""Pictures of what FADC layers do to an image: dilation maps and band weights; spectra of features and kernels.

Only the functions that draw import matplotlib, so that importing fadc_timm does not take longer.
"""
from ._common import save
from .dilation import LayerRecord, StageSummary, collect, figure, summarize, table
from .spectrum import LayerSpectra, collect_spectra, first_of_stages, spectrum_figure, spectrum_table

__all__ = [
    'LayerRecord', 'LayerSpectra', 'StageSummary', 'collect', 'collect_spectra', 'figure', 'first_of_stages', 'save',
    'spectrum_figure', 'spectrum_table', 'summarize', 'table']
