"""What an FADConv2d consists of, read once, and whether it is still so: for calls that do not call its modules."""
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple, Type
from weakref import ref

from torch import nn

from ..ops.latest import Latest
from ..ops.sampled_conv.triton import ACTS
from .ada_dr import AdaDR
from .ada_kern import AdaKern, Head
from .freq_select import FreqSelect
from .own_hooks import does_more, says_more
from .predictor_conv import PredictorConv2d

if TYPE_CHECKING:
    from .fad_conv import FADConv2d

__all__ = ['Conv', 'Frame', 'Layer', 'Norm', 'frame_of']


class Conv(NamedTuple):
    """A convolution without its tensors: stride, padding and dilation of the rows and of the columns."""
    stride: Tuple[int, ...]
    padding: Tuple[int, ...]
    dilation: Tuple[int, ...]
    groups: int


class Norm(NamedTuple):
    """AdaKern's norm without its tensors. groups: Of a GroupNorm; 0 for a BatchNorm."""
    eps: float
    groups: int
    batch_statistics: bool
    momentum: float


class Layer(NamedTuple):
    """A layer without its tensors. A part that it lacks is None, or its tensors are."""
    bands: Tuple[int, ...]
    map_groups: int
    maps: Optional[Conv]
    norm: Optional[Norm]
    high_alone: bool  # the only head is that of the high part
    o: Conv
    mask_dw: Optional[Conv]
    mask_pw: Optional[Conv]
    act: int
    base: float
    conv: Conv


class _Own(NamedTuple):
    """A module as it was found: its class, and the dictionaries that it keeps all in."""
    module: Any
    cls: Type[Any]
    attributes: Dict[str, Any]
    parameters: Dict[str, Any]
    buffers: Dict[str, Any]
    modules: Dict[str, Any]


class _Facts:
    """What was read of the modules of a layer, to see whether it is still so."""

    def __init__(self) -> None:
        self._modules: List[_Own] = []
        self._children: List[Tuple[Dict[str, Any], str, Any]] = []
        self._absent: List[Tuple[Dict[str, Any], str]] = []
        self._read: List[Tuple[Dict[str, Any], str, Any]] = []
        self._lacks: List[Tuple[Dict[str, Any], str, bool]] = []

    def add(self, module: Any, cls: Type[Any]) -> None:
        """A module, of which nothing but its class says what a call does, or which is called all the same."""
        own = module.__dict__
        self._modules.append(_Own(module, cls, own, own['_parameters'], own['_buffers'], own['_modules']))

    def read(self, module: Any, name: str) -> Any:
        """An attribute; a module's attributes take longer where they are asked for as such."""
        value = module.__dict__[name]
        self._read.append((module.__dict__, name, value))
        return value

    def child(self, module: Any, name: str) -> Any:
        """A module of a module, or None."""
        modules = module._modules
        if name not in modules:
            self._absent.append((modules, name))
            return None
        self._children.append((modules, name, modules[name]))
        return modules[name]

    def lacks(self, tensors: Dict[str, Any], name: str) -> bool:
        """Whether there is no tensor of a name among the parameters or the buffers of a module."""
        lacks = tensors.get(name) is None
        self._lacks.append((tensors, name, lacks))
        return lacks

    def is_own(self, module: Any, cls: Type[Any]) -> bool:
        """Whether a call of a module does what its class says, and no more."""
        if type(module) is not cls or does_more(module):
            return False
        self.add(module, cls)
        return True

    def hold(self) -> bool:
        """Whether all of it is still so."""
        try:
            for module, cls, own, parameters, buffers, modules in self._modules:
                if (type(module) is not cls or module.__dict__ is not own or own['_parameters'] is not parameters
                        or own['_buffers'] is not buffers or own['_modules'] is not modules or says_more(own)):
                    return False
            for entries, name, value in self._children:
                if entries[name] is not value:
                    return False
            for entries, name, value in self._read:
                found = entries[name]
                if found is not value and found != value:
                    return False
        except KeyError:
            return False
        for entries, name in self._absent:
            if name in entries:
                return False
        return all((entries.get(name) is None) == lacks for entries, name, lacks in self._lacks)


# Where a tensor of a module is: its dictionary of parameters or buffers, and its name there.
_Place = Optional[Tuple[Dict[str, Any], str]]


class Frame:
    """A layer as it was found. It stays with the layer itself, and not with copies of it.

    owner: The layer. places: Of the tensors of a call except for the map. batches: Of the number of batches that a norm
        saw. latest: What is known of calls like the latest one, for the caller.
    """
    __slots__ = ('batches', 'facts', 'latest', 'layer', 'owner', 'places')

    def __init__(
            self, owner: nn.Module, facts: _Facts, layer: Layer, places: Tuple[_Place, ...], batches: _Place) -> None:
        self.owner, self.facts, self.layer, self.places, self.batches = ref(owner), facts, layer, places, batches
        self.latest: Optional[Latest] = None

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(None), ()


def _norm_of(norm: Any, facts: _Facts) -> Optional[Tuple[Optional[Norm], Tuple[_Place, ...], _Place]]:
    """A norm, where its tensors are, and its count of batches; or None where torch's function does not do the same."""
    if not facts.is_own(norm, type(norm)):
        return None
    if type(norm) is nn.Identity:
        return None, (None,) * 4, None
    places = (norm._parameters, 'weight'), (norm._parameters, 'bias')
    if type(norm) is nn.GroupNorm:
        return Norm(facts.read(norm, 'eps'), facts.read(norm, 'num_groups'), False, 0.), (*places, None, None), None
    if type(norm) is not nn.BatchNorm2d:
        return None
    has_statistics = not facts.lacks(norm._buffers, 'running_mean')
    batch_statistics = facts.read(norm, 'training') or not has_statistics
    momentum = facts.read(norm, 'momentum')
    if facts.read(norm, 'track_running_stats') != has_statistics or (batch_statistics and momentum is None):
        return None
    statistics = ((norm._buffers, 'running_mean'), (norm._buffers, 'running_var')) if has_statistics else (None, None)
    count = (norm._buffers, 'num_batches_tracked') if batch_statistics and has_statistics else None
    return Norm(facts.read(norm, 'eps'), 0, batch_statistics, momentum or 0.), (*places, *statistics), count


def _conv_of(conv: Any, cls: Type[Any], facts: _Facts) -> Optional[Conv]:
    """A convolution, or None where :func:`_convolve` cannot take its place."""
    if not facts.is_own(conv, cls) or facts.read(conv, 'padding_mode') != 'zeros':
        return None
    stride, padding, dilation = (facts.read(conv, name) for name in ('stride', 'padding', 'dilation'))
    if not type(stride) is type(padding) is type(dilation) is tuple:  # a list may change without a new value
        return None
    return Conv(stride, padding, dilation, facts.read(conv, 'groups'))


def _find(layer: 'FADConv2d') -> Optional[Frame]:
    """The frame of a layer, or None where its parts have to be called one by one."""
    facts = _Facts()
    facts.add(layer, type(layer))
    select, kern, dr = (facts.child(layer, name) for name in ('freq_select', 'ada_kern', 'ada_dr'))
    if facts.read(layer, 'pads_itself') or not facts.is_own(dr, AdaDR) or facts.read(dr, 'crop'):
        return None
    maps, bands, groups, norm, count = None, (), 1, None, None
    places: List[_Place] = [None] * 2
    if select is not None:
        if not facts.is_own(select, FreqSelect):
            return None
        conv = facts.child(select, 'conv')
        maps = _conv_of(conv, PredictorConv2d, facts)
        if maps is None:
            return None
        bands, groups = facts.read(select, 'bands'), facts.read(select, 'spatial_group')
        if type(bands) is not tuple:
            return None
        places = _of_module(conv)
    heads: List[Any] = []
    if kern is None:
        places += [None] * 10
    else:
        if not facts.is_own(kern, AdaKern) or not facts.is_own(facts.child(kern, 'act'), nn.ReLU):
            return None
        fc, of_norm = facts.child(kern, 'fc'), _norm_of(facts.child(kern, 'norm'), facts)
        heads = [head for head in (facts.child(kern, 'low'), facts.child(kern, 'high')) if head is not None]
        if of_norm is None or not facts.is_own(fc, nn.Linear) or not all(facts.is_own(h, Head) for h in heads):
            return None
        norm, of_norm_tensors, count = of_norm
        places += [*_of_module(fc), *of_norm_tensors]
        for head in heads:
            places += _of_module(head)
        places += [None] * (12 - len(places))
    conv = facts.child(dr, 'conv')
    o = _conv_of(conv, PredictorConv2d, facts)
    places += _of_module(conv)
    dw, pw = (facts.child(dr, name) for name in ('mask_dw', 'mask_pw'))
    mask_dw = mask_pw = None
    if dw is not None:
        mask_dw, mask_pw = _conv_of(dw, nn.Conv2d, facts), _conv_of(pw, PredictorConv2d, facts)
        if mask_dw is None or mask_pw is None or not facts.lacks(dw._parameters, 'bias'):
            return None  # it is made without a bias
        places += [(dw._parameters, 'weight'), *_of_module(pw)]
    else:
        places += [None] * 3
    if o is None:
        return None
    stride, padding = facts.read(layer, 'stride')[0], facts.read(layer, 'inner_padding')
    this = Layer(
        bands, groups, maps, norm, len(heads) == 1 and kern is not None and kern._modules.get('low') is None, o,
        mask_dw, mask_pw, ACTS.index(facts.read(dr, 'dilation_act')), float(facts.read(dr, 'dilation')),
        Conv((stride,) * 2, (padding,) * 2, (1, 1), facts.read(layer, 'groups')))
    return Frame(layer, facts, this, (*places, *_of_module(layer)), count)


def _of_module(module: nn.Module) -> List[_Place]:
    return [(module._parameters, 'weight'), (module._parameters, 'bias')]


def frame_of(layer: 'FADConv2d') -> Optional[Frame]:
    """The frame of a layer as it is now, or None where its parts have to be called one by one."""
    frame: Optional[Frame] = layer.__dict__.get('_frame')
    if frame is None or frame.owner() is not layer or not frame.facts.hold():
        frame = layer.__dict__['_frame'] = _find(layer)
    return frame
