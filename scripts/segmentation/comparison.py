"""What is compared: settings and presets."""
from typing import NamedTuple


class Setting(NamedTuple):
    """A row of the comparison.

    name: Of the row.
    variant: Of the backbone.
    what: In words.
    options: Of segmentation.train, beyond the preset's.
    longer: Steps, as a multiple of the preset's.
    against: The setting that it is compared with, run by run of the same seed.
    """
    name: str
    variant: str
    what: str
    options: tuple[str, ...] = ()
    longer: float = 1.0
    against: str = 'plain'


SETTINGS = (
    Setting('plain', 'plain', 'plain'),
    Setting('adadr', 'adadr', '+ AdaDR'),
    Setting('adadr_adakern', 'adadr_adakern', '+ AdaDR + AdaKern'),
    Setting('fadc', 'fadc', '+ AdaDR + AdaKern + FreqSelect (FADC)'),
    Setting('dcnv2', 'dcnv2', 'deformable convolution v2'),
    Setting('dcnv2_fadc', 'dcnv2_fadc', 'deformable convolution v2 + AdaKern + FreqSelect'),
    Setting('dilation2', 'dilation2', 'fixed dilation 2'),
)
REMEDIES = (
    Setting('fadc_lr10', 'fadc', "FADC, its parameters' learning rate times 10", ('--fadc-lr', '10')),
    Setting('fadc_lr0.1', 'fadc', "FADC, its parameters' learning rate times 0.1", ('--fadc-lr', '0.1')),
    Setting('fadc_no_fs4', 'fadc', 'FADC without FreqSelect in stage 4 (maps of 16 px and less)',
            ('--freq-select-stages', '2', '3')),
    Setting('fadc_dilation1.5', 'fadc', 'FADC, dilation 1.5 at the start', ('--fadc', 'eps=0.5')),
    Setting('fadc_replicate', 'fadc', "FADC, padding by replication as in the authors' code",
            ('--fadc', 'padding_mode=replicate')),
    Setting('fadc_dilation_loss', 'fadc', "FADC, with the dilation loss, weight 0.01", ('--dilation-loss', '0.01')),
    Setting('plain_longer', 'plain', 'plain, twice the steps', longer=2.0),
    Setting('fadc_longer', 'fadc', 'FADC, twice the steps', longer=2.0, against='plain_longer'),
)
# Of a backbone of its own: neighbourhood attention, and FreqSelect before it.
ATTENTION = (
    Setting('dinat_mini', 'plain', 'DiNAT-Mini', ('--backbone', 'dinat_mini'), against='dinat_mini'),
    Setting('dinat_mini_fadc', 'fadc', 'DiNAT-Mini + FreqSelect', ('--backbone', 'dinat_mini'), against='dinat_mini'),
    Setting('dinat_mini_fadc_lr0.1', 'fadc', "DiNAT-Mini + FreqSelect, FreqSelect's learning rate times 0.1",
            ('--backbone', 'dinat_mini', '--fadc-lr', '0.1'), against='dinat_mini'),
)
BY_NAME = {setting.name: setting for setting in SETTINGS + REMEDIES + ATTENTION}


class Preset(NamedTuple):
    """What the runs of a comparison share.

    crop, batch, steps: Of segmentation.train.
    options: The others.
    """
    crop: int
    batch: int
    steps: int
    options: tuple[str, ...]


PRESETS = {
    # random weights and few steps: a higher learning rate than the published one, no auxiliary head
    'cpu': Preset(256, 8, 300, (
        '--backbone', 'test_resnet', '--decoder-channels', '32', '--lr', '3e-3', '--warmup', '30', '--aux-loss', '0',
        '--channels-last', '--device', 'cpu', '--log-every', '25', '--save-every', '50')),
    'gpu': Preset(512, 16, 4000, (
        '--backbone', 'resnet50', '--warmup', '200', '--amp', 'bfloat16', '--device', 'cuda', '--workers', '8',
        '--save-every', '500')),
}


def command(preset: Preset, setting: Setting, seed: int, steps: int = 0) -> list[str]:
    """Options of segmentation.train for a run; `steps` in place of the preset's, if given."""
    total = round((steps or preset.steps) * setting.longer)
    return ['--variant', setting.variant, '--crop', str(preset.crop), '--batch', str(preset.batch), '--steps',
            str(total), '--seed', str(seed), *preset.options, *setting.options]
