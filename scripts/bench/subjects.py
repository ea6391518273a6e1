"""What the benchmarks measure: a plain network, its FADC network off the identity, and steps of either."""
import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fadc_timm.layers import FADC_LAYERS, FADConv2d, FADNeighborhoodAttention
from fadc_timm.models._family import architecture_of
from fadc_timm.ops import set_backend
from scripts.bench.today import make_today

__all__ = [
    'AMP_DTYPES', 'COMPILE', 'FORMATS', 'RIVALS', 'Setting', 'captured', 'leave_identity', 'make_models', 'make_step',
    'place', 'training_state']

Step = Callable[[], Any]

AMP_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
COMPILE = ('no', 'yes', 'graph', 'reduce-overhead')

# What a network without a plain base of its own is compared with.
RIVALS = dict.fromkeys(('nat_mini', 'dinat_mini'), 'swin_tiny_patch4_window7_224')

# Of the largest value of a step's result: by how much a captured step may differ from an eager one.
_CAPTURE_TOLERANCE = 5e-2


class Setting(NamedTuple):
    """How a step runs: on which device, under autocast to which dtype ('' for none), and in which way.

    compile: 'no' is eager, 'yes' through inductor, 'graph' captured in a CUDA graph, 'reduce-overhead' is inductor in
        that mode.
    """
    device: str = 'cpu'
    amp: str = ''
    compile: str = 'no'

    def autocast(self) -> Any:
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=AMP_DTYPES[self.amp])


def _draw(conv: nn.Conv2d, x: Tensor, mean: Tensor, std: Tensor) -> None:
    """Random parameters with which the output for x (B, C, H, W) has a mean and a spread over positions, each (O,)."""
    assert conv.bias is not None
    nn.init.normal_(conv.weight)
    nn.init.zeros_(conv.bias)
    y = conv(x)
    # on a map of few pixels the spread may be small by chance
    scale = std / torch.maximum(y.std(dim=(0, 2, 3), unbiased=False), 0.1 * y.abs().mean(dim=(0, 2, 3)) + 1e-6)
    conv.weight *= scale[:, None, None, None]
    conv.bias.copy_(mean - scale * y.mean(dim=(0, 2, 3)))


def _leave_identity(layer: FADConv2d | FADNeighborhoodAttention, x: Tensor) -> None:
    """Random FADC parameters, of a size that fits the layer's input x (B, C, H, W), or (B, H, W, C) of an attention."""
    if isinstance(layer, FADNeighborhoodAttention):
        x = x.permute(0, 3, 1, 2)
    if layer.freq_select is not None:
        conv = layer.freq_select.conv
        n = torch.ones(conv.out_channels)
        _draw(conv, x, 0.3 * torch.randn_like(n), n)
        x = layer.freq_select(x)
    if layer.ada_kern is not None:
        kern, norm = layer.ada_kern, layer.ada_kern.norm
        kern.reset_parameters()
        pooled = kern.fc(x.mean(dim=(2, 3)))
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            rms = float(pooled.square().mean().sqrt()) + 1e-6
            nn.init.normal_(norm.running_mean, std=0.1 * rms)
            nn.init.uniform_(norm.running_var, 0.5 * rms ** 2, 1.5 * rms ** 2)
        nn.init.normal_(norm.weight, 1., 0.1)
        nn.init.normal_(norm.bias, std=0.1)
        for head in (kern.low, kern.high):
            if head is not None:
                assert head.bias is not None
                nn.init.normal_(head.weight, std=head.weight[0].numel() ** -0.5)
                nn.init.normal_(head.bias, std=0.3)
    if isinstance(layer, FADNeighborhoodAttention):
        return
    if layer.ada_dr is not None:
        dr = layer.ada_dr
        conv, g, d = dr.conv, dr.dilation_groups, dr.dilation
        mean, std = 0.3 * torch.randn(conv.out_channels), torch.ones(conv.out_channels)
        mean[:g], std[:g] = (d - 0.5) / d, 0.6 / d  # of the dilation before its activation: d + 0.5, and 0.6 pixels
        _draw(conv, x, mean, std)
        if dr.mask_dw is not None and dr.mask_pw is not None:
            dr.mask_dw.reset_parameters()
            n = torch.ones(dr.mask_pw.out_channels)
            _draw(dr.mask_pw, dr.mask_dw(x), 0.3 * torch.randn_like(n), n)
    if layer.free_offsets is not None:
        free = layer.free_offsets
        mean, std = 0.3 * torch.randn(free.conv.out_channels), torch.ones(free.conv.out_channels)
        std[:free.num_offsets] = 0.6  # of the offsets, in pixels
        if free.dw is not None:
            free.dw.reset_parameters()
            x = free.dw(x)
        _draw(free.conv, x, mean, std)


@torch.no_grad()
def leave_identity(model: nn.Module, seed: int = 0, size: int = 128) -> None:
    """Move every FADC parameter of a network, or of a layer, off the identity, modestly, as after training.

    Dilations then vary over the positions, between about d - 0.5 (where the activation admits it) and d + 2 pixels;
    free offsets by about 0.6 pixels around means of about 0.3. Gains, masks and band weights lie around one, most of
    them between 0.5 and 1.5. The parameters are drawn layer by layer, in the order of running, to fit the layer's input
    for a random image.

    Args:
        model: On the CPU, in float32. Weights and biases of its convolutions stay.
        seed: Of the parameters and of the image.
        size: Side of the image, or of a layer's input, in pixels.
    """
    def before(layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, (FADConv2d, FADNeighborhoodAttention))
        _leave_identity(layer, args[0])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        x = torch.randn(2, channels, size, size)
        training = model.training
        handles = [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, FADC_LAYERS)]
        try:
            model.eval()(x)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()


class _InTriton(nn.Module):
    """A network whose FADC layers run in Triton's kernels. Backward passes are those of the forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with set_backend('triton'):
            return self.model(x)


@torch.no_grad()
def make_models(name: str, variants: Any, seed: int = 0) -> dict[str, nn.Module]:
    """The networks by variant: 'plain', 'today', 'fadc' and 'triton', with the same weights where they have the same.

    Branches that timm starts at zero (the last norms of residual blocks, layer scale) are started at 0.3, so that
    activations and gradients are those of a network in training.

    Args:
        name: An architecture of this package, such as `<base>_fadc`; or one of `RIVALS`, whose 'plain' is its rival.
        variants: Which of the four; 'today' is for convolutions alone, 'triton' is the FADC network with Triton's
            kernels.
        seed: Of all weights.
    """
    arch = architecture_of(name)
    if arch is None and name not in RIVALS:
        raise ValueError(f'The model must be one of this package, such as <base>_fadc, got {name!r}.')
    torch.manual_seed(seed)
    plain = timm.create_model(RIVALS[name] if arch is None else arch.base)
    for key, p in plain.named_parameters():
        if (p == 0).all() and key.endswith('weight') or key.endswith('.gamma'):
            p.fill_(0.3)
    models = {'plain': plain}
    if set(variants) - {'plain'}:
        fadc = timm.create_model(name, num_classes=plain.num_classes)
        if arch is not None:
            unexpected = fadc.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
            if unexpected:
                raise ValueError(f'{name} lacks parameters of its base: {", ".join(unexpected)}.')
            leave_identity(fadc, seed)
        models['fadc'] = fadc
        if 'today' in variants and any(isinstance(m, FADConv2d) for m in fadc.modules()):
            models['today'] = make_today(fadc)
        if 'triton' in variants:
            models['triton'] = _InTriton(copy.deepcopy(fadc))
    return {v: models[v] for v in variants if v in models}


def place(model: nn.Module, x: Tensor, device: str, memory_format: str) -> tuple[nn.Module, Tensor]:
    """A copy of a network, and a batch x (B, 3, H, W), on a device in a memory format of `FORMATS`."""
    layout = FORMATS[memory_format]
    return copy.deepcopy(model).to(device).to(memory_format=layout), x.to(device).to(memory_format=layout)


def training_state(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the training steps: SGD with momentum, at a rate that changes the weights next to nothing."""
    return torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)


def captured(step: Step, warm_up: int = 3) -> Step:
    """A step in a CUDA graph, in the way in which torch's documentation captures a whole network.

    Args:
        step: Returns a tensor, the same one at every call, nearly.
        warm_up: Number of calls before the capture, on a side stream.

    Returns:
        Replays the graph and returns its tensor.

    Raises:
        RuntimeError: The step cannot be captured, or the graph computes something else.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            expected = step().clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    # the graph reads the network's memory, and does not keep it
    replay.step = step  # type: ignore[attr-defined]
    error = float((replay() - expected).abs().max() / expected.abs().max())
    if not error <= _CAPTURE_TOLERANCE:
        raise RuntimeError(f'The captured step differs from the eager one by {error:.1e} of the largest value.')
    return replay


def _runnable(model: nn.Module, compile: str) -> Callable[[Tensor], Tensor]:
    if compile not in COMPILE:
        raise ValueError(f'compile must be one of {", ".join(COMPILE)}, got {compile!r}.')
    if compile in ('no', 'graph'):
        return model
    return torch.compile(model, dynamic=False, mode=None if compile == 'yes' else compile)


def make_step(
        model: nn.Module,
        x: Tensor,
        what: str,
        setting: Setting,
        optimizer: torch.optim.Optimizer | None = None,
) -> Step:
    """One inference, or one training step (forward, loss, backward, SGD), as a callable.

    Args:
        model: In the memory format and on the device of x; it is set to the mode of the step.
        x: Images (B, 3, H, W).
        what: 'inference' or 'train'.
        setting: How it runs; under float16 the loss is not scaled, which takes no time.
        optimizer: Of a training step, None for :func:`training_state`.
    """
    model.train(what == 'train')
    run = _runnable(model, setting.compile)
    if what == 'inference':
        def infer() -> Tensor:
            if setting.compile == 'reduce-overhead':
                torch.compiler.cudagraph_mark_step_begin()
            with torch.inference_mode(), setting.autocast():
                return run(x)
        return captured(infer) if setting.compile == 'graph' else infer

    state = training_state(model) if optimizer is None else optimizer
    labels = torch.arange(x.shape[0], device=x.device)

    def train() -> Tensor:
        if setting.compile == 'reduce-overhead':
            torch.compiler.cudagraph_mark_step_begin()
        state.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        state.step()
        return loss.detach()
    return captured(train) if setting.compile == 'graph' else train
