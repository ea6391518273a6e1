"""Pictures of what FADC layers do to an image: dilation maps, taps and band weights; spectra of features and kernels.

Only the functions that draw import matplotlib, so that importing fadc_timm does not take longer.
"""
from ._common import save
from .dilation import LayerRecord, StageSummary, all_at_start, collect, figure, summarize, table
from .images import read_image, to_rgb
from .spectrum import (
    LayerSpectra,
    all_unchanged,
    collect_spectra,
    first_of_stages,
    spectrum_figure,
    spectrum_table,
)
from .taps import LayerTaps, StageTaps, draw_taps, select_taps, taps_of

__all__ = [
    'LayerRecord', 'LayerSpectra', 'LayerTaps', 'StageSummary', 'StageTaps', 'all_at_start', 'all_unchanged', 'collect',
    'collect_spectra', 'draw_taps', 'figure', 'first_of_stages', 'read_image', 'save', 'select_taps', 'spectrum_figure',
    'spectrum_table', 'summarize', 'table', 'taps_of', 'to_rgb']
