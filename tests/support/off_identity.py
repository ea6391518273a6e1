"""The one way in which tests move FADC off the identity."""
import torch
from torch import nn

from fadc_timm.layers.fad_conv import PARTS


@torch.no_grad()
def off_identity(module, std=1.0, statistics=True):
    """Random values for all that FADC adds, so that bands, gains, dilations, offsets and masks are in play; in place.

    The parameters of the convolutions themselves stay. The size does not follow the input, as that of
    `scripts.bench.subjects.leave_identity` does, which is for times.

    Args:
        module: A model, a layer, or a module of FADC alone.
        std: Standard deviation of what a filter with inputs of deviation one puts out.
        statistics: Draw the running statistics of AdaKern's norms too.
    """
    parts = [m for m in module.modules() if isinstance(m, tuple(PARTS.values()))]
    for part in parts:
        for p in part.parameters():
            p.add_(torch.randn_like(p) * std / p[0].numel() ** 0.5)
    for part in parts if statistics else ():
        for m in part.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(std=0.2)
                m.running_var.uniform_(0.2, 0.5)
    return module
