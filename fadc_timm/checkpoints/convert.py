"""Convert local checkpoints to FADC models, and account for every key.

They are of a base or of an FADC model, alone or within another network, of the authors' code, or of mmdetection or
mmsegmentation with deformable convolutions.
"""
import argparse
import pickle
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..models._checkpoint import why_unreadable
from ..models._family import architecture_of, fadc_keys, family_of
from .official import convert_checkpoint, refuse_caffe, refuse_dilated, rename_stem

__all__ = [
    'AUTHORS', 'Checkpoint', 'Converted', 'OPENMMLAB', 'OTHER', 'RELEASES', 'TIMM', 'convert', 'pretrained_cfg',
    'read_checkpoint', 'report', 'summary', 'what_was_blocked']

StateDict = Dict[str, Tensor]

# The dilation's activation in the authors' two releases.
RELEASES = {'december2024': 'abs', 'april2024': 'relu'}

# Where training scripts keep the weights, the averaged ones first.
_EMA, _RAW = ('state_dict_ema', 'model_ema'), ('state_dict', 'model')

# Where mmsegmentation's TIMMBackbone and segmentation_models_pytorch keep a model of timm's, and mmdetection and
# mmsegmentation one of their own.
_OWN = 'backbone.'
_WITHIN = ('backbone.timm_model.', 'encoder.model.', _OWN)

# Names within the layers of the authors and of mmcv.
_LAYERS = re.compile(r'conv\d*_offset\.|\.conv_mask\.|\.OMNI_ATT|\.FS\.')

# Who wrote a checkpoint.
TIMM, AUTHORS, OPENMMLAB, OTHER = (
    'timm', "the authors' code", 'mmdetection or mmsegmentation', 'a network around the backbone')

# Modules of networks in mmdetection and mmsegmentation, and of the code for segmentation that is made for these.
_OPENMMLAB_NAMES = ('stem.', 'downsample_layers.', 'levels.')


class Checkpoint(NamedTuple):
    """What a file holds.

    state_dict: Tensors by their names, without the prefixes of wrappers. Of a backbone within another network they are
        the backbone's, by its own names; not where it has layers of the authors or of mmcv.
    entry: The file's key that the tensors were under; empty where the file holds the tensors themselves.
    left: The file's other keys.
    meta: What the file says about itself under `meta`, as mmdetection and mmsegmentation do.
    within: The prefix of such a backbone, which need not have the last norm and the classifier; else empty.
    normalisation: The `mean` and `std` of the images that it was trained with, where the file has them, as those of
        this project's training scripts do.
    """
    state_dict: StateDict
    entry: str
    left: List[str]
    meta: Mapping[str, Any] = {}
    within: str = ''
    normalisation: Mapping[str, Tuple[float, ...]] = {}

    @property
    def official(self) -> bool:
        """Whether it has layers of the authors' code, or of mmcv's deformable convolution: these keep the prefix."""
        return any(key.startswith(_OWN) for key in self.state_dict)


class Converted(NamedTuple):
    """A model and where each of its tensors comes from.

    model: With the weights, in eval mode.
    model_args: Arguments that the model was built with, except the number of classes.
    taken: The model's keys whose values come from the checkpoint, each with the checkpoint's keys that it came from.
    added: The model's keys that keep their initial values, with which FADC is the identity.
    left: Keys of the checkpoint that were not used.
    writer: Who wrote the checkpoint.
    """
    model: nn.Module
    model_args: Dict[str, Any]
    taken: Dict[str, List[str]]
    added: List[str]
    left: List[str]
    writer: str


def what_was_blocked(error: pickle.UnpicklingError) -> str:
    """Why torch.load with weights_only=True refused a file; torch's own text recommends to load it nevertheless."""
    text = str(error)
    found = re.search(r'(Unsupported global|Trying to load unsupported GLOBAL).*?(?=\.(\s|$))', text, re.DOTALL)
    return f'weights_only=True blocked it{f" ({found.group()})" if found else ""}'


def read_checkpoint(path: Path, use_ema: bool = True) -> Checkpoint:
    """Read a .safetensors file, or a pickle without running code that it may contain.

    Args:
        path: The file.
        use_ema: Take the averaged weights if the file has them.

    Raises:
        OSError: The file cannot be read.
        RuntimeError: The file is cut off or damaged, would run code, or holds no tensors.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f'{path} is a folder, wanted a file. The folder of a model is loaded with fadc_timm.load.')
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    reason = why_unreadable(str(path))
    if reason:
        raise RuntimeError(f'{path} cannot be read as weights: it is {reason}.')
    try:
        if path.suffix == '.safetensors':
            content: Any = load_file(path)
        else:
            # timm's train script keeps its arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        raise RuntimeError(f'{path} cannot be read as weights: {what_was_blocked(e)}') from e
    except (SafetensorError, EOFError, RuntimeError, KeyError) as e:
        raise RuntimeError(f'{path} cannot be read as weights: {e}') from e
    if not isinstance(content, Mapping):
        raise RuntimeError(f'{path} holds a {type(content).__name__}, wanted names and tensors.')
    names = (*_EMA, *_RAW) if use_ema else _RAW
    entry = next((name for name in names if isinstance(content.get(name), Mapping)), '')
    tensors = content[entry] if entry else content
    state_dict = dict(tensors)
    while (cleaned := clean_state_dict(state_dict)).keys() != state_dict.keys():  # one wrapper per call in older timm
        state_dict = cleaned
    state_dict = {k: v for k, v in state_dict.items() if isinstance(v, Tensor)}
    if not state_dict:
        raise RuntimeError(f'{path} holds no tensors{f" under {entry}" if entry else ""}.')
    others = [k for k, v in tensors.items() if not isinstance(v, Tensor)]
    rest = [f'{k}.*' if isinstance(v, Mapping) else k for k, v in content.items() if k != entry]
    left = rest if entry else others
    prefix = next((p for p in _WITHIN if any(k.startswith(p) for k in state_dict)), '')
    if prefix == _OWN and any(key.startswith(_OWN) and _LAYERS.search(key) for key in state_dict):
        prefix = ''
    if prefix:
        left += [k for k in state_dict if not k.startswith(prefix)]
        state_dict = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    meta, config = content.get('meta'), content.get('config')
    said = config if isinstance(config, Mapping) and {'backbone', 'variant'} <= config.keys() else {}
    normalisation = {key: tuple(said[key]) for key in ('mean', 'std') if said.get(key)}
    return Checkpoint(
        state_dict, entry, left, meta if entry and isinstance(meta, Mapping) else {}, prefix, normalisation)


def _origins(tensor: Tensor, names: Mapping[int, str]) -> Set[str]:
    """Names of the leaves that a tensor was computed from, along autograd's graph."""
    if id(tensor) in names:
        return {names[id(tensor)]}
    found: Set[str] = set()
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None)
        if leaf is not None:
            found.add(names[id(leaf)])
        nodes += [n for n, _ in node.next_functions]
    return found


def _as_whole(state_dict: StateDict, model: nn.Module) -> StateDict:
    """The tensors of a backbone by the names that they have in a whole network, with what it lacks as the model has it.

    timm's features_only makes names such as `stages_1`. Other code for segmentation has a norm of its own behind each
    stage, which is left out, and a stem in the names of mmsegmentation.
    """
    children = dict(model.named_children())
    deep = isinstance(children.get('conv1'), nn.Sequential)
    out = {}
    for key, value in state_dict.items():
        key = key.replace('.depthwise_conv.', '.dwconv.').replace('.pointwise_conv', '.pwconv')  # of mmpretrain
        head, _, rest = key.partition('.')
        flat = re.fullmatch(r'(.+)_(\d+)', head)
        if head not in children and flat and flat[1] in children:
            key = f'{flat[1]}.{flat[2]}.{rest}'
        elif head == 'stem' and 'conv1' in children:
            key = rename_stem(key, deep)
        elif head not in children and re.fullmatch(r'norm\d', head):
            continue
        out[key] = value
    norm = family_of(model).head_norm
    if norm is not None:
        # in the names of ConvNeXt's authors it does not stand in the head
        theirs = norm.rpartition('.')[2] if any(key.startswith('downsample_layers.') for key in out) else norm
        for name, value in model.get_submodule(norm).state_dict().items():
            out.setdefault(f'{theirs}.{name}', value)
    return out


def _adapt(checkpoint: Checkpoint, model: nn.Module) -> Tuple[StateDict, Dict[str, Set[str]]]:
    """The model's state dict from a checkpoint, and for each of its keys the checkpoint's keys that it was made of.

    Conversions rename, reshape, join and scale tensors, and autograd follows all of these.
    """
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in checkpoint.state_dict.items()}
    names = {id(v): k for k, v in leaves.items()}
    with torch.enable_grad():
        if checkpoint.official:
            out = convert_checkpoint(dict(state_dict=leaves, meta=checkpoint.meta), model)
        else:
            refuse_caffe(checkpoint.meta)
            whole = _as_whole(leaves, model) if checkpoint.within else dict(leaves)
            out = family_of(model).checkpoint_filter_fn(whole, model)
        origins = {k: _origins(v, names) for k, v in out.items()}
    return {k: v.detach() for k, v in out.items()}, origins


def _create(name: str, num_classes: Optional[int], model_args: Dict[str, Any]) -> nn.Module:
    kwargs = dict(model_args) if num_classes is None else dict(num_classes=num_classes, **model_args)
    model = timm.create_model(name, **kwargs)
    if not fadc_keys(model):
        raise ValueError(f'{name} is no FADC model of this package; they are listed by: fadc-timm list')
    return model


def _is_deformable(name: str, model_args: Mapping[str, Any]) -> bool:
    """Whether a model has deformable convolutions."""
    arch = architecture_of(name)
    options = {**(arch.variant.options if arch is not None else {}), **model_args}
    return options.get('sampling') == 'deform'


def _classifier(model: nn.Module) -> str:
    """Name of the classifier's weight."""
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # a dictionary, not a module
    return f'{cfg["classifier"]}.weight'


def _ada_kern_norm(state_dict: Mapping[str, Tensor]) -> Optional[str]:
    """The kind of norm that AdaKern has in a checkpoint of an FADC model; None where there is none."""
    names = {key.rpartition('.ada_kern.norm.')[2] for key in state_dict if '.ada_kern.norm.' in key}
    if 'running_mean' in names:
        return 'batchnorm2d'
    return 'layernorm2d' if 'weight' in names else None


def convert(
        checkpoint: Checkpoint,
        name: str,
        model_args: Optional[Dict[str, Any]] = None,
        release: str = 'december2024',
) -> Converted:
    """Lift a checkpoint into an FADC model with as many classes as the checkpoint has.

    Args:
        checkpoint: Of timm's base or FADC model, alone or within a network for segmentation or detection; of the
            authors' code; or, for a model with deformable convolutions, of mmdetection or mmsegmentation with such.
        name: A model of this package, such as `<arch>_fadc` or `<arch>_dcn.<tag>`.
        model_args: Arguments of `timm.create_model`.
        release: Which release of the authors' code wrote the checkpoint; ignored for timm's.

    Raises:
        NotImplementedError: The checkpoint's configuration says what no model of timm computes, or that its network is
            dilated where `model_args` have no `output_stride`.
        RuntimeError: Keys are missing or left over, or shapes differ; the message names them.
        ValueError: `name` is no FADC model.
    """
    official = checkpoint.official
    args = dict(model_args or {})
    if 'output_stride' not in args:
        refuse_dilated(checkpoint.meta)
    if official:
        writer = OPENMMLAB if _is_deformable(name, args) else AUTHORS
    else:
        writer = TIMM
        if checkpoint.within == _OWN:
            named = any(key.startswith(_OPENMMLAB_NAMES) for key in checkpoint.state_dict)
            writer = OPENMMLAB if named or checkpoint.meta else OTHER
    if writer == AUTHORS:
        args = {'padding_mode': 'replicate', 'dilation_act': RELEASES[release], **args}
    norm = 'batchnorm2d' if writer == AUTHORS else _ada_kern_norm(checkpoint.state_dict)
    if norm is not None and architecture_of(name) is not None:
        args.setdefault('ada_kern_norm', norm)
    num_classes = args.pop('num_classes', 0 if official else None)
    model = _create(name, num_classes, args)
    state_dict, origins = _adapt(checkpoint, model)
    weight = state_dict.get(_classifier(model))
    classes = 0 if weight is None else weight.shape[0]
    if num_classes is None and classes != getattr(model, 'num_classes', None):
        model = _create(name, classes, args)
    own = model.state_dict()
    model.load_state_dict({k: state_dict.get(k, v) for k, v in own.items()}, strict=True)
    taken = {k: sorted(origins[k]) for k in own if origins.get(k)}
    used = {source for sources in taken.values() for source in sources}
    return Converted(
        model.eval(), args, taken, [k for k in own if k not in taken],
        [k for k in checkpoint.state_dict if k not in used], writer)


def pretrained_cfg(name: str, checkpoint: Checkpoint, converted: Converted) -> Dict[str, Any]:
    """What config.json says of converted weights. It claims a tag only if the name has one and timm wrote them."""
    out: Dict[str, Any] = dict(checkpoint.normalisation)
    if converted.writer != TIMM or '.' not in name:
        out.update(dict.fromkeys(('tag', 'license', 'paper_ids', 'origin_url', 'description', 'notes', 'label_names')))
    if converted.writer in (AUTHORS, OPENMMLAB):
        # these backbones see images normalised as timm's default does
        out.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    if converted.writer == AUTHORS:
        out.update(paper_ids='arXiv:2403.05369', origin_url='https://github.com/Linwei-Chen/FADC')
    return out


def report(checkpoint: Checkpoint, converted: Converted) -> List[str]:
    """A line per key: taken, added or left."""
    lines = []
    for key, sources in converted.taken.items():
        source = ' + '.join(sources)
        lines.append(f'taken  {source}' + (f' -> {key}' if source != key else ''))
    lines += [f'added  {key}' for key in converted.added]
    return lines + [f'left   {key}' for key in (*converted.left, *checkpoint.left)]


def _grouped(keys: List[str], most: int = 8) -> str:
    """The keys by their first names, each with the number of keys."""
    groups: Dict[str, List[str]] = {}
    for key in keys:
        groups.setdefault(key.partition('.')[0], []).append(key)
    texts = [f'{name}.* ({len(found)})' if len(found) > 1 else found[0] for name, found in groups.items()]
    return ', '.join(texts[:most]) + (f' and {len(texts) - most} more' if len(texts) > most else '')


def summary(checkpoint: Checkpoint, converted: Converted) -> List[str]:
    """How many keys were taken, added and left, and of what the left ones were; counts of batches are not told."""
    under = f', its tensors under {checkpoint.entry!r}' if checkpoint.entry else ''
    fadc = set(fadc_keys(converted.model))
    # a batch norm's count of batches is of no use to a trained network, and many files lack it
    other = [key for key in converted.added if key not in fadc and not key.endswith('.num_batches_tracked')]
    left = [*converted.left, *checkpoint.left]
    lines = [
        f'A checkpoint of {converted.writer}{under}.',
        f'taken  {len(converted.taken)} tensors of the model',
        f'added  {len(fadc.intersection(converted.added))} tensors of FADC, which start as the identity']
    if other:
        lines.append(f'added  {len(other)} other tensors at their initial values: {_grouped(other)}')
    return [*lines, f'left   {len(left)} entries of the file{f": {_grouped(left)}" if left else ""}']
