"""The zoo: importing this package registers its models with timm."""
from . import dinat, fadc_convnext, fadc_dinat, fadc_resnet, lifted
from .dinat import DiNAT
from .fadc_convnext import FADCConvNeXt
from .fadc_dinat import FADCDiNAT
from .fadc_resnet import FADCResNet
from .lift import LiftReport, lift_model
from .optim import param_groups

__all__ = [
    'DiNAT', 'FADCConvNeXt', 'FADCDiNAT', 'FADCResNet', 'LiftReport', 'dinat', 'fadc_convnext', 'fadc_dinat',
    'fadc_resnet', 'lift_model', 'lifted', 'param_groups']
