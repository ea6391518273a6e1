"""The modules of FADC, each usable alone, and the convolution and the attention that they make."""
from .ada_dr import AdaDR
from .ada_kern import AdaKern
from .fad_conv import FADConv2d
from .free_offsets import FreeOffsets
from .freq_select import FreqSelect
from .neighborhood_attention import FADNeighborhoodAttention, NeighborhoodAttention

__all__ = [
    'FADC_LAYERS', 'AdaDR', 'AdaKern', 'FADConv2d', 'FADNeighborhoodAttention', 'FreeOffsets', 'FreqSelect',
    'NeighborhoodAttention']

# The layers that have modules of FADC inside.
FADC_LAYERS = (FADConv2d, FADNeighborhoodAttention)
