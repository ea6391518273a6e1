"""The modules of FADC, each usable alone, and the convolution that they make."""
from .ada_dr import AdaDR
from .ada_kern import AdaKern
from .fad_conv import FADConv2d
from .free_offsets import FreeOffsets
from .freq_select import FreqSelect

__all__ = ['AdaDR', 'AdaKern', 'FADConv2d', 'FreeOffsets', 'FreqSelect']
