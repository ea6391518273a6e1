"""Pictures of what FADC layers do to an image: dilation maps and band weights; spectra of features and kernels.

Matplotlib is imported where a figure is drawn only: importing fadc_timm must not cost its import.
"""
from ._common import save
from .dilation import LayerRecord, StageSummary, collect, figure, summarize, table
from .spectrum import LayerSpectra, collect_spectra, first_of_stages, spectrum_figure, spectrum_table

__all__ = [
    'LayerRecord', 'LayerSpectra', 'StageSummary', 'collect', 'collect_spectra', 'figure', 'first_of_stages', 'save',
    'spectrum_figure', 'spectrum_table', 'summarize', 'table']
