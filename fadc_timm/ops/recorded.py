"""Functions of tensors that are recorded once, and then replayed without the Python that they are written in.

In eager mode a GPU waits for Python: a layer's call is some launches and products, and four times as many small tensors
and views that lead to them. All of these follow from shapes, strides and dtypes. So the first call of a kind runs as it
is written, the second is recorded, and from the third on the recorded launches and operators of torch are called on the
memory of the new tensors. Tensors in between share a block of memory.
"""
from collections import OrderedDict
from contextlib import suppress
from operator import itemgetter
from threading import Lock, get_ident
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import triton_support
from .latest import Latest

__all__ = ['Program', 'Programs', 'Tensors', 'addresses_of', 'record']

Tensors = Sequence[Optional[Tensor]]
Function = Callable[..., Tensors]

_aten = torch.ops.aten
# What gives a tensor that is not filled.
_EMPTY = {
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default}
# torch's functions for recorded operators, which take a third of the time of a call of the operator itself.
_FAST: Dict[Any, Callable[..., Any]] = {
    _aten.mm.out: torch.mm, _aten.bmm.out: torch.bmm, _aten.mm.default: torch.mm, _aten.bmm.default: torch.bmm,
    _aten.addmm_.default: Tensor.addmm_, _aten.baddbmm_.default: Tensor.baddbmm_, _aten.add_.Tensor: Tensor.add_,
    _aten.zero_.default: Tensor.zero_, _aten.convolution.default: torch.convolution, _aten.sum.dim_IntList: torch.sum}
for _multiply in ('mm', 'bmm'):  # with a dtype for the result, from torch 2.8 on
    if hasattr(getattr(_aten, _multiply), 'dtype'):
        _FAST[getattr(_aten, _multiply).dtype] = getattr(torch, _multiply)
# Parts of a block of memory start at multiples of so many bytes, as a tensor of its own does.
_ALIGNED = 512
# A tensor of more bytes is dropped as soon as no later step reads it.
_LARGE = 2 ** 16


class _Base:
    """Memory that recorded tensors are in.

    kind: 'input', 'empty' for what was not filled when it was made, 'result' of an operator, or 'constant' for what was
        there before. tensor: Of a constant. size, stride, offset: Of the tensor that was there first.
    """

    def __init__(self, kind: str, t: Tensor) -> None:
        self.kind, self.dtype, self.device = kind, t.dtype, t.device
        self.size, self.stride, self.offset = tuple(t.shape), t.stride(), int(t.storage_offset())
        self.elements = t.untyped_storage().nbytes() // t.element_size()
        self.tensor = t if kind == 'constant' else None


class _Part(NamedTuple):
    """A recorded tensor: its base, its dtype, size and strides, and how many of its elements fit before it."""
    base: int
    dtype: torch.dtype
    size: Tuple[int, ...]
    stride: Tuple[int, ...]
    offset: int


class _Step(NamedTuple):
    """A recorded call. call: A Launch or an operator of torch. results: The bases that it makes."""
    call: Any
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    results: Tuple[Optional[int], ...]
    relaunch: Optional[Callable[..., None]]


class _Recorder(TorchDispatchMode):
    """Records the launches and the operators of the calls inside it, of this thread."""

    def __init__(self, inputs: Tensors) -> None:
        super().__init__()
        self.bases: List[_Base] = []
        self.steps: List[_Step] = []
        self.obstacle: Optional[str] = None
        self._known: Dict[int, int] = {}
        self._storages: List[Any] = []
        for t in inputs:
            if t is None:
                self.bases.append(_Base('constant', torch.empty(0)))
            elif t.untyped_storage()._cdata in self._known:
                self.obstacle = 'two inputs share their memory'
            else:
                self._add('input', t)

    def __enter__(self) -> '_Recorder':
        triton_support.observers[get_ident()] = self.launch
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        del triton_support.observers[get_ident()]
        super().__exit__(*error)

    def _add(self, kind: str, t: Tensor) -> int:
        storage = t.untyped_storage()
        # while there is a weak reference, no other storage has the address
        self._storages.append(torch.multiprocessing.reductions.StorageWeakRef(storage))
        self._known[storage._cdata] = len(self.bases)
        self.bases.append(_Base(kind, t))
        return len(self.bases) - 1

    def part(self, t: Tensor) -> _Part:
        index = self._known.get(t.untyped_storage()._cdata)
        if index is None:
            index = self._add('constant', t)
        base, offset = self.bases[index], int(t.storage_offset())
        if t.dtype == base.dtype:
            offset -= base.offset
        elif base.dtype != torch.uint8 or base.offset:  # only a block of memory is seen in several dtypes
            self.obstacle = f'{t.dtype} in memory of {base.dtype}'
        return _Part(index, t.dtype, tuple(t.shape), t.stride(), offset)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.part(a)
        if isinstance(a, (list, tuple)) and any(isinstance(x, Tensor) for x in a):
            self.obstacle = 'a list of tensors'
        return a

    def launch(self, this: triton_support.Launch, tensors: Tuple[Any, ...]) -> None:
        args = tuple([self._argument(t) for t in tensors])
        with _disable_current_modes():  # the interpreter's kernels call operators
            triton_support.launch_now(this, *tensors)
        relaunch = triton_support.relaunch_of(this, tensors)
        if relaunch is None and not triton_support.is_interpreted():
            self.obstacle = 'a kernel that was not kept'
        self.steps.append(_Step(this, args, {}, (), relaunch))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        recorded = tuple([self._argument(a) for a in args]), {k: self._argument(a) for k, a in kwargs.items()}
        output = func(*args, **kwargs)
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        if not all(t is None or isinstance(t, Tensor) for t in outputs):
            if any(isinstance(a, _Part) for a in recorded[0]):  # not so for what compares dtypes
                self.obstacle = f'{func} gives a number'
            return output
        new = [t is not None and t.untyped_storage()._cdata not in self._known for t in outputs]
        if func in _EMPTY:
            self._add('empty', output)
        elif func is _aten.zeros.default:
            self._add('empty', output)
            self.steps.append(_Step(_aten.zero_.default, (self.part(output),), {}, (None,), None))
        elif func._schema.is_mutable or any(new):
            results = tuple([self._add('result', t) if n else None for t, n in zip(outputs, new)])
            self.steps.append(_Step(func, *recorded, results, None))
        return output


# A step of a replay: it reads and writes the values, and their addresses.
_Action = Callable[[List[Any], List[int]], None]


class _Values:
    """The values of a replay by number, and the steps that make them: inputs, blocks of memory, results, views."""

    def __init__(self, recorder: _Recorder, inputs: int) -> None:
        self.bases, self.count = recorder.bases, inputs
        self.steps: List[_Action] = []
        self.slot: Dict[int, int] = {i: i for i in range(inputs)}  # of a base: its value
        self.shift: Dict[int, int] = {}  # of a base: the elements of its value before it
        self.constants: List[Tuple[int, Any]] = []
        self._in_dtypes: Dict[Tuple[int, torch.dtype], int] = {}
        self._views: Dict[_Part, int] = {}

    def add(self) -> int:
        self.count += 1
        return self.count - 1

    def block(self, bases: Dict[int, int], size: int, device: torch.device) -> None:
        """Put bases, each of which starts after so many bytes, into a block of memory."""
        slot = self.add()

        def allocate(values: List[Any], at: List[int]) -> None:
            # torch.empty takes twice as long
            values[slot] = torch.empty_strided((size,), (1,), dtype=torch.uint8, device=device)

        self.steps.append(allocate)
        for index, start in bases.items():
            dtype = self.bases[index].dtype
            self.slot[index], self.shift[index] = self._typed(slot, dtype), start // dtype.itemsize

    def _typed(self, block: int, dtype: torch.dtype) -> int:
        """The value that is a block of memory in a dtype."""
        if (block, dtype) in self._in_dtypes:
            return self._in_dtypes[block, dtype]
        slot = self._in_dtypes[block, dtype] = self.add()

        def view(values: List[Any], at: List[int]) -> None:
            t = values[slot] = values[block].view(dtype)
            at[slot] = t.data_ptr()

        self.steps.append(view)
        return slot

    def own(self, index: int) -> None:
        """Give a base memory of its own."""
        base, slot = self.bases[index], self.add()
        size, stride, dtype, device = base.size, base.stride, base.dtype, base.device

        def allocate(values: List[Any], at: List[int]) -> None:
            t = values[slot] = torch.empty_strided(size, stride, dtype=dtype, device=device)
            at[slot] = t.data_ptr()

        self.steps.append(allocate)
        self.slot[index] = slot

    def is_whole(self, part: _Part) -> bool:
        """Whether a tensor is a value itself, and not a view of it."""
        base = self.bases[part.base]
        return part.base not in self.shift and part[1:] == (base.dtype, base.size, base.stride, 0)

    def tensor(self, part: _Part) -> int:
        """The value that is a tensor, for which there is a step if need be."""
        slot = self._slot(part.base)
        if self.is_whole(part):
            return slot
        if part.dtype != self.bases[part.base].dtype:
            slot = self._typed(slot, part.dtype)
        constant = self.bases[part.base].tensor
        if part not in self._views and constant is not None:
            self._views[part] = self.constant(
                constant.as_strided(part.size, part.stride, constant.storage_offset() + part.offset))
        elif part not in self._views:
            view = self._views[part] = self.add()
            size, stride, offset = part.size, part.stride, part.offset + self.shift.get(part.base, 0)

            def make(values: List[Any], at: List[int]) -> None:
                values[view] = values[slot].as_strided(size, stride, offset)

            def make_of_input(values: List[Any], at: List[int]) -> None:
                t = values[slot]
                values[view] = t.as_strided(size, stride, t.storage_offset() + offset)

            is_part = part.base in self.shift
            self.steps.append(make if is_part else make_of_input)
        return self._views[part]

    def address(self, part: _Part) -> Tuple[int, int]:
        """The value that a tensor is in, and the bytes of it before the tensor."""
        return self._slot(part.base), (part.offset + self.shift.get(part.base, 0)) * part.dtype.itemsize

    def _slot(self, index: int) -> int:
        if index not in self.slot:
            tensor = self.bases[index].tensor
            assert tensor is not None
            self.slot[index] = self.constant(tensor)
        return self.slot[index]

    def constant(self, value: Any) -> int:
        """A value that is the same in all replays."""
        slot = self.add()
        self.constants.append((slot, value))
        return slot


def _lifetimes(steps: Sequence[_Step]) -> Dict[int, Tuple[int, int]]:
    """Of each base: the first and the last step that has it."""
    found: Dict[int, Tuple[int, int]] = {}
    for i, step in enumerate(steps):
        for a in (*step.args, *step.kwargs.values()):
            if isinstance(a, _Part):
                found[a.base] = found.get(a.base, (i, i))[0], i
    return found


def _place(sizes: Dict[int, int], lifetimes: Dict[int, Tuple[int, int]]) -> Tuple[Dict[int, int], int]:
    """Where bases of so many bytes start in one block, and its size. Bases that are not there together may overlap."""
    placed: Dict[int, int] = {}
    for index in sorted(sizes, key=lambda i: -sizes[i]):
        first, last = lifetimes[index]
        taken = sorted((placed[i], placed[i] + sizes[i]) for i in placed
                       if lifetimes[i][0] <= last and first <= lifetimes[i][1])
        start = 0
        for low, high in taken:
            if start + sizes[index] <= low:
                break
            start = max(start, high)
        placed[index] = start
    return placed, max([placed[i] + sizes[i] for i in placed], default=0)


def _fast(step: _Step) -> Tuple[Callable[..., Any], Tuple[Any, ...], Dict[str, Any]]:
    """A function that does what an operator does in less time, and its arguments."""
    if step.call is _aten._to_copy.default and set(step.kwargs) == {'dtype'}:
        return Tensor.to, (*step.args, step.kwargs['dtype']), {}
    return _FAST.get(step.call, step.call), step.args, step.kwargs


def _reader(values: _Values, args: Sequence[Any]) -> Callable[[List[Any]], Tuple[Any, ...]]:
    """What gives the arguments of a step from the values of a replay, which hold constants too."""
    slots = [values.tensor(a) if isinstance(a, _Part) else values.constant(a) for a in args]
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda v: tuple([v[slot] for slot in slots])


def _call_step(values: _Values, step: _Step) -> None:
    function, args, kwargs = _fast(step)
    read, names, read_named = _reader(values, args), tuple(kwargs), _reader(values, tuple(kwargs.values()))
    slots = [None if r is None else values.add() for r in step.results]
    values.slot.update({r: slot for r, slot in zip(step.results, slots) if r is not None and slot is not None})
    single, slot = len(slots) == 1, slots[0] if slots else None

    def call_into(v: List[Any], at: List[int]) -> None:
        out, = read_named(v)
        function(*read(v), out=out)

    def call_for_one(v: List[Any], at: List[int]) -> None:
        assert slot is not None
        t = v[slot] = function(*read(v))
        at[slot] = t.data_ptr()

    def call(v: List[Any], at: List[int]) -> None:
        output = function(*read(v), **dict(zip(names, read_named(v))))
        for t, s in zip((output,) if single else output, slots):
            if s is not None:
                v[s], at[s] = t, t.data_ptr()

    if names == ('out',) and not any(slots):
        values.steps.append(call_into)
    else:
        values.steps.append(call_for_one if single and slot is not None and not names else call)


def _launch_step(values: _Values, step: _Step) -> None:
    this, relaunch = step.call, step.relaunch
    if relaunch is None:
        found = [None if a is None else values.tensor(a) for a in step.args]

        def launch(v: List[Any], at: List[int]) -> None:
            tensors: Any = [None if i is None else v[i] for i in found]
            triton_support.launch(this, *tensors)

        values.steps.append(launch)
        return
    places = [None if a is None else values.address(a) for a in step.args]
    present = tuple([place for place in places if place is not None])

    def launch_again(v: List[Any], at: List[int]) -> None:
        relaunch(at[-1], *[None if place is None else at[place[0]] + place[1] for place in places])

    def launch_on_all(v: List[Any], at: List[int]) -> None:
        relaunch(at[-1], *[at[i] + n for i, n in present])

    values.steps.append(launch_again if None in places else launch_on_all)


def _drop(slots: Sequence[int]) -> _Action:
    def drop(values: List[Any], at: List[int]) -> None:
        for slot in slots:
            values[slot] = None
    return drop


class Program:
    """A recorded function.

    saved: Number of tensors that hold those outputs that need no memory of their own, besides the inputs.
    programs: For functions that read these, as a backward pass does.
    """

    def __init__(self, recorder: _Recorder, inputs: Tensors, outputs: Sequence[Optional[_Part]], own: int) -> None:
        values, bases = _Values(recorder, len(inputs)), recorder.bases
        lifetimes = _lifetimes(recorder.steps)
        owned = {p.base for p in outputs[:own] if p is not None}
        kept = {p.base for p in outputs[own:] if p is not None} - owned
        blocks: Dict[Tuple[torch.device, bool], Dict[int, int]] = {}
        for i, base in enumerate(bases):
            if base.kind == 'empty' and i not in owned and (i in lifetimes or i in kept):
                size = -(-base.elements * base.dtype.itemsize // _ALIGNED) * _ALIGNED
                blocks.setdefault((base.device, i in kept), {})[i] = size
        always = 0, len(recorder.steps)
        for (device, is_kept), sizes in blocks.items():
            values.block(*_place(sizes, dict.fromkeys(sizes, always) if is_kept else lifetimes), device)
        made = {i for i in owned if bases[i].kind == 'empty'}
        stays = owned | kept
        for n, step in enumerate(recorder.steps):
            for i in [i for i in made if i in lifetimes and lifetimes[i][0] == n]:
                values.own(i)
            (_launch_step if isinstance(step.call, triton_support.Launch) else _call_step)(values, step)
            done = [i for i, (_, last) in lifetimes.items() if last == n and bases[i].kind == 'result'
                    and i not in stays and bases[i].elements * bases[i].dtype.itemsize > _LARGE]
            if done:
                values.steps.append(_drop(
                    [values.slot[i] for i in done] + [s for p, s in values._views.items() if p.base in done]))
        for i in made - set(lifetimes):
            values.own(i)
        self.outputs = [None if p is None else values.tensor(p) for p in outputs[:own]]
        # of the other outputs: the input or the saved tensor that they are in, and where
        block_of = {typed: block for (block, _), typed in values._in_dtypes.items()}
        places = [None if p is None else values._slot(p.base) for p in outputs[own:]]
        memory = [None if i is None else block_of.get(i, i) for i in places]
        self._saved = sorted({i for i in memory if i is not None and i >= len(inputs)})
        self._others: List[Optional[Tuple[int, _Part, bool]]] = []
        for p, found in zip(outputs[own:], memory):
            if p is None or found is None:
                self._others.append(None)
                continue
            at = found if found < len(inputs) else len(inputs) + self._saved.index(found)
            part = p._replace(offset=p.offset + values.shift.get(p.base, 0))
            self._others.append((at, part, values.is_whole(p)))
        self.saved = len(self._saved)
        self.programs = Programs(at_once=True)
        self._steps = values.steps
        self._blank: List[Any] = [None] * (values.count - len(inputs))
        self._zeros = [0] * (values.count - len(inputs) + 1)  # the last is the stream
        devices = [t.get_device() for t in inputs if t is not None and t.is_cuda]
        self._device = devices[0] if devices else None
        for slot, value in values.constants:
            self._blank[slot - len(inputs)] = value
            if isinstance(value, Tensor):
                self._zeros[slot - len(inputs)] = value.data_ptr()

    def __call__(self, inputs: Tensors, addresses: Sequence[int]) -> Tuple[List[Optional[Tensor]], List[Tensor]]:
        """The outputs that have memory of their own; and the tensors from which :meth:`others` makes the others.

        Args:
            inputs: Tensors of the shapes, strides, dtypes and devices of those of the recorded call.
            addresses: Their :func:`addresses_of`, each as many bytes after a multiple of 16 as then.
        """
        values: List[Any] = [*inputs, *self._blank]
        at = [*addresses, *self._zeros]
        if self._device is not None:
            at[-1] = triton_support.current_stream(self._device)
        for step in self._steps:
            step(values, at)
        return [None if i is None else values[i] for i in self.outputs], [values[i] for i in self._saved]

    def others(self, inputs: Tensors, saved: Sequence[Tensor]) -> List[Optional[Tensor]]:
        """The outputs that have no memory of their own."""
        all_of = [*inputs, *saved]
        made: List[Optional[Tensor]] = []
        for other in self._others:
            if other is None:
                made.append(None)
                continue
            at, part, is_whole = other
            t = all_of[at]
            assert t is not None
            if not is_whole:
                t = t if t.dtype == part.dtype else t.view(part.dtype)
                t = t.as_strided(part.size, part.stride, t.storage_offset() + part.offset)
            made.append(t)
        return made


def record(function: Function, inputs: Tensors, own: int) -> Tuple[List[Optional[Tensor]], Optional[Program]]:
    """Call a function, and record the call.

    Args:
        function: It makes no decision that depends on values or on anything but shapes, strides and dtypes.
        inputs: Its arguments.
        own: So many of its results, the first ones, have memory of their own.

    Returns:
        The results, and their program, or None where a call cannot be replayed.
    """
    with _Recorder(inputs) as recorder:
        results = list(function(*inputs))
    outputs = [None if t is None else recorder.part(t) for t in results]
    if any(p is not None and recorder.bases[p.base].kind in ('input', 'constant') for p in outputs[:own]):
        recorder.obstacle = 'a result is in the memory of an input'
    return results, None if recorder.obstacle else Program(recorder, inputs, outputs, own)


def addresses_of(tensors: Tensors) -> List[int]:
    """The addresses of tensors, 0 for None."""
    return [0 if t is None else t.data_ptr() for t in tensors]


_SEEN, _PLAIN = 'seen', 'plain'


class Programs:
    """Programs of a function by the kind of its calls."""

    def __init__(self, most: int = 512, at_once: bool = False) -> None:
        """
        Args:
            most: How many are kept. What was not asked for the longest goes first.
            at_once: Whether the first call of a kind is recorded, and not the second.
        """
        self.most, self.at_once = most, at_once
        self.latest: Optional[Latest] = None  # for the caller
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def _keep(self, kind: Hashable, program: Any) -> None:
        with self._lock:
            while len(self._kept) >= self.most and kind not in self._kept:
                del self._kept[next(iter(self._kept))]
            self._kept[kind] = program

    def find(self, kind: Hashable) -> Optional[Program]:
        """The program of a kind of calls, if there is one."""
        program = self._kept.get(kind)
        if type(program) is not Program:
            return None
        with suppress(KeyError):  # another thread dropped it
            self._kept.move_to_end(kind)
        return program

    def run(self, kind: Hashable, function: Function, inputs: Tensors, own: int) -> List[Optional[Tensor]]:
        """The results of a function for a kind of calls that has no program. The second such call makes one."""
        state = self._kept.get(kind)
        if state is None and not self.at_once:
            self._keep(kind, _SEEN)
        elif state is None or state is _SEEN:
            self._keep(kind, _PLAIN)  # so that no other thread records it too
            try:
                results, program = record(function, inputs, own)
            except BaseException:  # as where memory runs out
                self._keep(kind, _SEEN)
                raise
            if program is not None:
                self._keep(kind, program)
            return results
        return list(function(*inputs))
