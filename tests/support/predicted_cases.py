"""The operator on what a layer predicts: inputs before their activations, and the results by the definition."""
import zlib

import torch

from fadc_timm.ops.sampled_conv import predicted_conv2d
from tests.support import cases
from tests.support.cases import GAINS

BASE = 2


def make_inputs(case, act, dtype, device='cpu', joint=True):
    """Leaves: x, weight, bias, o and perhaps mask, low and high, by the names of the operator's arguments.

    Args:
        case: An OpCase. Its dilations are those that the activation gives, where it is not at its end.
        act: AdaDR's activation.
        dtype: Of all of them but weight and bias, which under autocast are float32.
        device: Of all of them.
        joint: One tensor holds o and what the mask follows from.
    """
    exact = {name: t.detach() for name, t in cases.make_inputs(case, torch.float64).items()}
    generator = torch.Generator().manual_seed(zlib.crc32(act.encode()))
    signs = 2. * torch.randint(2, exact['dilation'].shape, generator=generator) - 1
    o = (exact['dilation'] - 1).abs() / BASE * signs
    mask = torch.randn(case.shapes['mask'], generator=generator, dtype=torch.float64)
    named = {'x': exact['x'], 'weight': exact['weight'], 'bias': exact.get('bias'),
             'o': torch.cat((o, mask), 1) if joint else o, 'mask': None if joint else mask}
    for part in ('low', 'high'):
        gains = [exact[f'{part}_{side}'] for side in ('in', 'out') if f'{part}_{side}' in exact]
        depthwise = 1 < case.groups == case.x[1] == case.o
        named[part] = 2 * (gains[0] if depthwise else torch.cat(gains, 1)) - 2 if gains else None
    keep = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: t.to(device, keep if name in ('weight', 'bias') else dtype).requires_grad_()
            for name, t in named.items() if t is not None}


def activate(o, act):
    """AdaDR's dilation."""
    if act == 'abs':
        o = torch.where(o < 0, -o, o)
    elif act == 'relu':
        o = torch.where(o < 0, torch.zeros_like(o), o)
    else:
        o = (o + 1).relu() - 1
    return 1 + o * BASE


def call(case, inputs, act):
    return predicted_conv2d(
        inputs['x'], inputs['weight'], inputs.get('bias'), inputs['o'], inputs.get('mask'), inputs.get('low'),
        inputs.get('high'), dilation_act=act, dilation=BASE, stride=case.stride[0], padding=case.k // 2,
        groups=case.groups)


def definition(case, inputs, act):
    """In float64, by the reference."""
    exact = {name: t.double() for name, t in inputs.items()}
    o, mask = exact['o'], exact.get('mask')
    if mask is None:
        o, mask = o[:, :case.dilation_groups], o[:, case.dilation_groups:]
    gains = dict.fromkeys(GAINS)
    for part in ('low', 'high'):
        if part in exact:
            gain = 2 * torch.sigmoid(exact[part])
            gains[f'{part}_in'] = gain[:, :case.x[1]]
            gains[f'{part}_out'] = gain[:, case.x[1]:] if gain.shape[1] > case.x[1] else None
    args = {'x': exact['x'], 'weight': exact['weight'], 'bias': exact.get('bias'), 'dilation': activate(o, act),
            'mask': 2 * mask.sigmoid(), **gains}
    return cases.call(case, args, 'reference')


def results(f, case, inputs, act):
    """The output and the gradients, that of o in two parts."""
    y = f(case, inputs, act)
    grads = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), cases.output_gradient(case, y))))
    if 'mask' not in inputs:
        grads['mask'] = grads['o'][:, case.dilation_groups:]
    grads['o'] = grads['o'][:, :case.dilation_groups]
    return {'out': y.detach(), **grads}


# what a tolerance of the operator's is called for each of these
NAMES = {'o': 'dilation', 'low': 'gain', 'high': 'gain'}
