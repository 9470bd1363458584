"""Records a model's forward: the ATen operations that it executes, on tensors whose values nobody computes.

The model's own code runs as it is, on real tensors of the right shape, dtype and device; nothing stands in for a
tensor, so there is nothing that C++ code could mistake. A dispatch mode sees every operation, whoever called it, and
a tensor that is computed from the images gets memory but no values: an operation on it becomes a stage. What is not
computed from the images is computed as ever. Memory is followed by its storage: a write changes what every view of it
stands for, and a write into the model's own tensors goes to a copy. Whatever reads a value of the images (`item`,
`bool`, `numpy`) ends the record, by name.

Why this way, and what it costs: docs/network.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from zfcore.errors import ShapeError, UnsupportedOperation, ZfcoreError
from zfcore.kinds import check_memory, plain, unusual
from zfcore.network import aten, whole
from zfcore.network.counting import IMAGES, Count
from zfcore.network.guard import kept, recording
from zfcore.network.memory import Memory, geometry, has_storage, overlaps
from zfcore.network.modes import Functions, Operations, calls_followed
from zfcore.network.operators import Operator, operator, tensors_in, with_tensors
from zfcore.network.stages import Stage
from zfcore.network.values import (
    Alike,
    Loose,
    Picked,
    Unknown,
    Unread,
    Value,
    jump_of,
    leaves,
    replaced,
)


class Stopped(Exception):
    """Ends a record; its `failure` says why."""


class _Shape(NamedTuple):
    """What is asked of a result, as of a tensor on the meta device."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def dim(self) -> int:
        return len(self.shape)


class Record:
    """One forward of a model, followed.

    calls:   what each call of a module returned: a Value, Unread, or the name of another type.
    output:  what the model returned.
    failure: why the forward was not followed to its end.
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        gradient: bool,
        example: Tensor | None = None,
        images: int = IMAGES,
        until: tuple[nn.Module, int] | None = None,
    ):
        """until: a module, and which of its calls is the last that is followed. gradient: what autograd would do counts, too. example: computes the values as well, of this image."""
        self.model, self.dtype, self.device, self.gradient, self.images = model, dtype, device, gradient, images
        self.image = Stage("input", shape=tuple(image_shape), name="image")
        self.example, self.until = example, until
        self.reached = False  # the call that was asked for
        self.choices: list[whole.Axis] = []  # where the images were found among other axes, one after the other
        self.guide: list[whole.Axis] | None = None  # those of a record of more images
        self.memories: dict[int, Memory] = {}
        self.paths = {module: name for name, module in model.named_modules()}
        self.scopes: list[nn.Module] = [model]
        self.calls: dict[nn.Module, list[object]] = {}
        self.owners: dict[Stage, tuple[nn.Module, int]] = {}  # the innermost call of a module that returned it
        self.output: object = None
        self.failure: ZfcoreError | None = None
        self.others: list[Record] = []  # those with other numbers of images
        self.stages = 0  # so far
        self.log: list[tuple] = []  # what was done, for comparison with a record of another number of images
        self.count = Count()  # what the model did with the number of images
        self.python = 0  # torch functions of Python's on their way
        self.inside = 0  # custom autograd functions on their way
        self.quiet = 0  # what is done with tensors now is the record's own doing
        self.entry = ""  # the method of nn.Module that leads here
        self.constants: list[Tensor] = []  # that were read, where hooks of the user's may free them

    # -- the forward

    def run(self) -> None:
        with ExitStack() as stack:
            self.keeping = stack.enter_context(kept(self.model))
            stack.callback(setattr, recording, "record", getattr(recording, "record", None))
            recording.record = self
            stack.enter_context(calls_followed(self))
            stack.enter_context(torch.set_grad_enabled(self.gradient))  # as when the stages run
            if self.example is not None:
                stack.enter_context(self.keeping.watching())
            try:
                # Below autograd, so that no graph is made and an operation is seen as the model called it.
                with torch._C._AutoDispatchBelowAutograd(), Functions(self), Operations(self):
                    self.output = self.model(self.picture())
                    self.returned(self.model, self.output)
                if any(map(unusual, self.constants)):
                    self.stop("frees its parameters after each forward")
            except Exception as error:  # the user's code, on tensors that hold no values, may fail in any way
                if self.failure is None:
                    self.fail(error)

    def picture(self) -> Tensor:
        shape = (self.images, *self.image.shape)
        with self.unseen():
            if self.example is None:
                picture = torch.empty(shape, dtype=self.dtype, device=self.device)
            else:
                picture = self.example.to(self.device, self.dtype).expand(shape).clone()
            self.put(picture, self.image)
        return picture

    def unseen(self) -> _Unseen:
        """What the record itself does with tensors is not the model's."""
        return _Unseen(self)

    def fail(self, error: Exception) -> None:
        if self.reached:
            return
        if isinstance(error, ZfcoreError):
            self.failure = error
            return
        what = str(error).strip() or "no message"
        self.failure = UnsupportedOperation(
            f"{self.described(self.scopes[-1])} cannot be followed: {type(error).__name__}: {what}"
        )
        self.failure.__cause__ = error

    def stop(self, why: str, cause: Exception | None = None) -> None:
        """The forward cannot be followed from here."""
        if self.failure is None:
            self.failure = self.unread(why, cause).error
        raise Stopped(str(self.failure)) from cause

    def misfit(self, error: ShapeError) -> None:
        """The images do not fit an operation; no forward goes on from there."""
        self.failure = self.failure or ShapeError(f"{self.described(self.scopes[-1])}: {error}")
        raise Stopped(str(self.failure)) from error

    def described(self, module: nn.Module) -> str:
        """How an error names a module: 'features.3' (Foo)."""
        return f"'{self.paths.get(module, '')}' ({type(module).__name__})"

    def unread(self, why: str, cause: Exception | None = None) -> Unread:
        error = UnsupportedOperation(f"{self.described(self.scopes[-1])} {why}")
        error.__cause__ = cause
        return Unread(error)

    # -- calls of modules

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        self.scopes.append(module)
        try:
            if self.gradient and (module._backward_hooks or module._backward_pre_hooks):
                self.stop("has backward hooks, which may change its gradient")
            out = forward(module, *args, **kwargs)
        except Exception as error:
            if self.failure is None:
                self.fail(error)
            raise
        self.scopes.pop()
        if module is not self.model:
            self.returned(module, out)
        return out

    def returned(self, module: nn.Module, out: object) -> None:
        """Note what a call of a module returned, as it is now."""
        value: object = type(out).__name__
        with self.unseen():
            if isinstance(out, Tensor):
                value = self.value_of(out)
                if value is None:
                    if module is not self.model:
                        return  # a constant of the model, computed as it goes
                    value = "constant"
                if isinstance(value, Picked):
                    value = self.named(aten.as_stage(value), "index")
        calls = self.calls.setdefault(module, [])
        if isinstance(value, Stage) and module is not self.model:
            self.owners.setdefault(value, (module, len(calls)))
        calls.append(value)
        if self.until == (module, len(calls) - 1):
            self.reached = True
            raise Stopped("the layer was reached")

    def custom(self, own: type, forward: Callable, args: tuple, kwargs: dict) -> object:
        """A custom autograd function: with a gradient asked for, one operation that keeps its own backward."""
        if own is checkpoint.CheckpointFunction:  # which computes what its argument does
            return args[0](*args[2:])
        if not self.gradient:
            return forward(*args, **kwargs)
        with self.unseen():
            values = with_tensors(args, self.values), with_tensors(kwargs, self.values)
        self.inside += 1
        try:
            out = forward(*args, **kwargs)
        finally:
            self.inside -= 1
        given = list(leaves(values))
        if not any(isinstance(v, Value | Unread) for v in given):
            return out
        self.count.use()  # which its arguments may tell, as numbers
        with self.unseen():
            lost = next((v for v in given if isinstance(v, Unread)), None)
            tensors = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
            read = [v for t, v in zip(leaves((args, kwargs)), given, strict=True) if isinstance(t, Tensor)]
            dirty = any(isinstance(v, Value) and self.value_of(t) is not v for t, v in zip(tensors, read, strict=True))
            function = partial(_applied_to_copies, own) if dirty else own.apply
            run = Loose(function, *values, (), self.dtype, 0)
            for which, t in enumerate(t for t in leaves(out) if isinstance(t, Tensor)):
                followed = self.value_of(t)  # its own operations say that it treats each image by itself
                if followed is None:
                    continue
                if lost is None and not isinstance(followed, Unread):
                    self.note(own.__name__, *values)
                    place = (tuple(t.shape), t.dtype, *whole.axis_of(followed))
                    one = Loose(function, *values, *place) if isinstance(out, Tensor) else Loose(_part, (run, which), {}, *place)
                    followed = self.settled(one, own.__name__)
                self.assign(t, lost or followed)
        return out

    # -- memory

    def memory(self, t: Tensor) -> Memory | None:
        return self.memories.get(t.untyped_storage()._cdata) if has_storage(t) else None

    def known(self, t: Tensor) -> Memory:
        key = t.untyped_storage()._cdata
        found = self.memories.get(key)
        if found is None:
            found = self.memories[key] = Memory(t, fresh=False)
        return found

    def put(self, t: Tensor, value: Value | Unread | None) -> Memory:
        """A new tensor, and what it stands for; None for a constant."""
        memory = self.memories[t.untyped_storage()._cdata] = Memory(t, True, value)
        return memory

    def value_of(self, t: Tensor) -> Value | Unread | None:
        """What a tensor stands for; None for a constant."""
        memory = self.memory(t)
        if memory is None or not memory.read:
            return None
        if t is memory.tensor and memory.value is not None:
            return memory.value
        return self.view(memory, geometry(t))

    def view(self, memory: Memory, key: tuple) -> Value | Unread:
        """What a geometry of a memory stands for."""
        value = memory.value if key == memory.base else memory.views.get(key)
        if value is not None:
            return value
        if memory.lost is not None:
            return memory.lost
        recipe = memory.recipes.get(key)
        if recipe is None:
            value = self.unread("has a view of a map that was made where it cannot be seen")
        else:
            parent, op, args, kwargs, which, shapes = recipe
            source = self.view(memory, parent)
            if isinstance(source, Unread):
                return source
            value = self.values_of(op, (source, *args), kwargs, shapes)[which]
        memory.views[key] = value
        return value

    def assign(self, t: Tensor, value: Value | Unread) -> None:
        """What a tensor stands for is said anew; nothing else on its memory stands for anything."""
        memory, key = self.known(t), geometry(t)
        if key == memory.base:
            memory.holds(value)
        else:
            memory.holds(None)
            memory.views[key] = value

    def viewed(self, op: Operator, source: Tensor, results: list[Tensor], args: tuple, kwargs: dict) -> None:
        """Note how views of a tensor were made."""
        memory, parent = self.known(source), geometry(source)
        shapes = [_Shape(tuple(r.shape), r.dtype) for r in results]
        for which, result in enumerate(results):
            key = geometry(result)
            if key != parent and key != memory.base and key not in memory.recipes:
                memory.recipes[key] = (parent, op, args, kwargs, which, shapes)

    def write(self, t: Tensor, value: Value | Unread) -> None:
        """A tensor's memory is overwritten."""
        memory, key = self.known(t), geometry(t)
        for twin in memory.all_twins():
            twin.lose(self.unread("works in place on what may be a view of a map that is in use, or a copy"))
        base = value
        if key != memory.base and not isinstance(value, Unread):
            try:
                base = self.scattered(memory, key, value)
            except Unknown as error:
                value = self.unread(f"writes to a part of a map in a way that the engines do not read ({error})", error)
        if isinstance(value, Unread):
            memory.lose(value)
        else:
            memory.holds(base)
            if key != memory.base:
                memory.views[key] = value

    def scattered(self, memory: Memory, key: tuple, value: Value) -> Value:
        """A memory's base with one part of it replaced."""
        chain, at = [], key
        while at != memory.base:
            recipe = memory.recipes.get(at)
            if recipe is None:
                raise Unknown("its other parts cannot be told")
            chain.append(recipe)
            at = recipe[0]
        chain.reverse()
        if not memory.read:
            constant = self.current(memory.tensor)
            if constant.dim() == 0 or len(constant) != self.images:
                raise Unknown("a constant that has no images")
            values = torch.zeros_like(constant) if memory.blank else constant.clone()
            part = whole.alike_all(values, whole.Axis(0), self.images)
            memory.holds(Loose(_itself, (part,), {}, tuple(constant.shape), constant.dtype, 0))
        base, part = self.view(memory, memory.base), self.view(memory, key)
        for each in (base, part):
            if isinstance(each, Unread):
                raise Unknown(str(each.error))
        if whole.axis_of(part) != whole.axis_of(value):
            raise Unknown("the images are on different axes")
        joined = self.as_cat(base, chain, value)
        if joined is not None:
            return joined
        steps = []
        for parent, op, args, kwargs, which, shapes in chain:
            call = whole.Call(op.name, op.bound((self.view(memory, parent), *args), kwargs), self.images)
            call.results = shapes
            rule = whole.RULES.get(op.name)
            if rule is None or kwargs:
                raise Unknown(f"through {op.name}")
            rule(call)  # which puts the number of images into sizes
            function = op.function
            if call.name == "reshape":
                function = torch.ops.aten.view.default
            elif call.name != op.name:
                raise Unknown(f"through {op.name}")
            steps.append((function, list(call.given.values())[1:], which))
        place = memory.base[0], memory.base[3]
        return self.settled(Loose(_written, (base, value, steps), {}, *place, *whole.axis_of(base)), "copy_")

    def as_cat(self, base: Value, chain: list[tuple], value: Value) -> Stage | None:
        """Channels next to one another that are replaced, as a map joined of its parts."""
        if len(chain) != 1 or not isinstance(base, Stage) or len(base.shape) != 3 or not isinstance(value, Stage | Picked):
            return None
        _, op, args, kwargs, _, _ = chain[0]
        if op.name != "slice":
            return None
        given = op.bound((base, *args), kwargs)
        if given["dim"] % 4 != 1 or given["step"] != 1:
            return None
        channels = torch.arange(base.shape[0], device="cpu")
        begin, end, _ = slice(given["start"], given["end"]).indices(base.shape[0])
        parts = [Picked(base, channels[:begin]), value, Picked(base, channels[end:])]
        parts = [p for p in parts if not (isinstance(p, Picked) and not len(p.index))]
        return self.named(aten.cat([self.named(aten.stage_of(p), "slice") for p in parts], 1), "copy_")

    # -- constants

    def current(self, t: Tensor) -> Tensor:
        """A constant, or its copy once that was written to."""
        memory = self.memory(t)
        if memory is None or memory.copy is None:
            return t
        return memory.copy.as_strided(t.shape, t.stride(), t.storage_offset())

    def held_constant(self, t: Tensor) -> Tensor:
        """A constant that becomes part of what is recorded."""
        if what := unusual(t):
            raise Unknown(f"reads a tensor that is {what}")
        if self.example is not None:
            self.constants.append(t)
        memory = self.memory(t)
        if memory is None:
            return plain(t)
        if memory.blank:
            raise Unknown("reads memory that was written to where it cannot be seen")
        memory.held = True
        # Where the forward computes, it writes too, and what was made in it has no copy that is written to instead.
        current = plain(self.current(t))
        return current.clone() if memory.fresh and self.example is not None else current

    @staticmethod
    def updates(op: Operator, args: tuple, kwargs: dict) -> bool:
        """Whether an operation writes to running statistics, which its schema does not say."""
        if not op.updating:
            return False
        given = op.bound(args, kwargs)
        return bool(given[op.updating]) and isinstance(given.get("running_mean"), Tensor)

    def constant(self, op: Operator, args: tuple, kwargs: dict, tensors: list[Tensor]) -> object:
        """An operation on what is not computed from the images: it is done."""
        changed: list[Tensor] = []
        check_memory(op.label, tensors)
        if self.updates(op, args, kwargs):
            self.stop("updates statistics of its own")
        for given in (*args, *kwargs.values()) if op.random else ():
            if isinstance(given, torch.Generator):
                self.keeping.keep_generator(given)
        if op.mutable:
            given = op.bound(args, kwargs)
            changed = tensors_in([given[name] for name in op.written])
            if (op.name in _REMAKING and op.name not in ("detach_", "requires_grad_")) or any(map(overlaps, changed)):
                self.stop(f"calls {op.label} on a tensor of its own")
            for t in changed:
                memory = self.known(t)
                memory.blank = False
                if memory.held or (memory.copy is None and not memory.fresh):
                    if what := unusual(t):
                        self.stop(f"calls {op.label} on a tensor that is {what}")
                    memory.shadow(t)
        if any((m := self.memory(t)) is not None and m.copy is not None for t in tensors):
            result = op.function(*with_tensors(args, self.current), **with_tensors(kwargs, self.current))
            if op.mutable:
                result = op.as_given(given, result)
        else:
            result = op.function(*args, **kwargs)
        lost = self.unread(f"calls {op.label}, which draws random numbers") if op.random else None
        results = [r for r in leaves(result) if isinstance(r, Tensor) and has_storage(r)]
        before = {t.untyped_storage()._cdata for t in tensors if has_storage(t)}
        if not op.mutable:
            for r in results:
                if r.untyped_storage()._cdata not in before:
                    self.put(r, lost).blank = op.blank
            if op.view and tensors and results and results[0].untyped_storage()._cdata in before:
                self.viewed(op, tensors[0], results, args[1:], kwargs)
        for t in changed if lost is not None else ():
            self.write(t, lost)
        return result

    # -- operations on what is computed from the images

    def operate(self, function, args: tuple, kwargs: dict) -> object:
        op = operator(function)
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(tuple(kwargs.values()))
        for t in tensors:
            if has_storage(t):
                memory = self.memories.get(t.untyped_storage()._cdata)
                if memory is not None and memory.read:
                    break
        else:
            return self.constant(op, args, kwargs, tensors)
        if self.failure is not None or self.reached:
            raise Stopped(str(self.failure))
        if op.shaped and self.value_of(args[0]) is None:
            self.count.use()
            return self.constant(op, (args[0], _blank(args[1])), kwargs, [args[0]])
        if self.example is not None and self.updates(op, args, kwargs):
            self.stop("updates statistics of its own")
        if not self.python:
            self.count.use()  # not Python's doing: what asked for the number of images is not seen
        if op.reading:
            self.stop(f"reads a value that is computed from the images ({op.label}): its control flow may depend on it")
        if op.asking:  # TorchScript's way to take a size
            self.count.tell()
            return function(*args, **kwargs)
        if op.like:  # its values play no part, but it has as many images
            self.count.use()
            args, kwargs = with_tensors(args, _blank), with_tensors(kwargs, _blank)
            return self.constant(op, args, kwargs, [])
        if op.mutable:
            return self.in_place(op, args, kwargs)
        if self.gradient and not self.inside and (op.name == "detach" or not torch.is_grad_enabled()):
            why = "detaches it" if op.name == "detach" else f"calls {op.label} under no_grad()"
            return self.not_read(op, args, kwargs, f"{why}, so that no gradient passes")
        if op.name == "squeeze" and self.squeezes_images(op, args, kwargs):
            return self.not_read(op, args, kwargs, "would squeeze a batch of one")
        if op.name == "index":
            args = (args[0], [_as_places(i) for i in args[1]])
        if op.name in ("_neg_view", "_conj"):  # a view's geometry does not tell that it is one of these
            return self.not_read(op, args, kwargs, op.unknown)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if op.may_copy and source is not None:
            return self.maybe_copied(op, args, kwargs)
        if op.view and source is not None and (m := self.memory(source)) is not None and m.read:
            result = function(*args, **kwargs)
            results = [r for r in leaves(result) if isinstance(r, Tensor)]
            storage = source.untyped_storage()._cdata
            if all(r.untyped_storage()._cdata == storage for r in results):
                self.viewed(op, source, results, args[1:], kwargs)
                return result
        return self.computed(op, args, kwargs)

    def computed(self, op: Operator, args: tuple, kwargs: dict) -> object:
        """New memory for an operation's results, and what they stand for."""
        values = self.values(args), self.values(kwargs) if kwargs else kwargs
        lost = _unread_in(values[0]) or (_unread_in(tuple(values[1].values())) if kwargs else None)
        results = None
        if lost is None and op.rule is not None and not op.of_channels and self.usual(values[0]):
            stage = self.at_once(op, *values)
            if stage is not None:
                results, shapes = [stage], [_Shape((self.images, *stage.shape), self.dtype)]
                if op.name == "zfcore::max_pool2d_with_switches":
                    results.append(self.unread("reads switches, which pools alone do"))
                    shapes.append(_Shape(shapes[0].shape, torch.uint8))
        if results is None:
            shapes = self.shapes(op, args, kwargs)
            results = self.values_of(op, *values, shapes) if lost is None else [lost] * len(shapes)
        if op.returning and results[0] is values[0][0]:  # dropout and the like, out of training
            return args[0]
        made, tensors = self.made(op, args, kwargs, shapes)
        for t, value in zip(tensors, results, strict=True):
            self.put(t, value)
        return made

    def made(self, op: Operator, args: tuple, kwargs: dict, shapes: list) -> tuple[object, list[Tensor]]:
        """Memory for an operation's results; with values, where there is an example."""
        if self.example is not None:
            made = op.function(*with_tensors(args, self.current), **with_tensors(kwargs, self.current))
            return made, [t for t in leaves(made) if isinstance(t, Tensor)]
        tensors = [torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in shapes]
        return op.structured(tensors), tensors

    def values(self, given: object) -> object:
        """Arguments with what they stand for in place of tensors."""
        kind = type(given)
        if kind is list and given and type(given[0]) is int:
            return given  # sizes, as most lists are
        if kind is tuple or kind is list:
            return kind([self.values(part) if isinstance(part, _HOLDING) else part for part in given])
        if kind is dict:
            return {key: self.values(part) for key, part in given.items()}
        if not isinstance(given, Tensor):
            return given
        found = self.value_of(given)
        if found is not None:
            return found
        try:
            return self.held_constant(given)
        except Unknown as error:
            return self.unread(str(error), error)

    def shapes(self, op: Operator, args: tuple, kwargs: dict) -> list[Tensor]:
        """What the operation's results look like, on the meta device."""
        kwargs = with_tensors(kwargs, _meta)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        try:
            made = op.function(*with_tensors(args, _meta), **kwargs)
        except NotImplementedError as error:
            self.stop(op.unknown, error)
        shapes = [t for t in leaves(made) if isinstance(t, Tensor)]
        if not shapes:
            self.stop(op.unknown)
        return shapes

    def usual(self, values: tuple) -> bool:
        """Whether no constant may give the result another dtype than the model's."""
        for value in values:
            if type(value) is complex or (isinstance(value, Tensor) and value.dtype != self.dtype):
                return False
        return True

    def at_once(self, op: Operator, args: tuple, kwargs: dict) -> Stage | None:
        """The stage of an operation whose shape follows from its rule alone."""
        try:
            made = op.rule(*args, **kwargs)
        except (Unknown, TypeError):
            return None
        except ShapeError as error:
            self.misfit(error)
        if not isinstance(made, Stage):
            return None
        self.note(op.name, args, kwargs)
        return self.named(made, op.name)

    def values_of(self, op: Operator, args: tuple, kwargs: dict, shapes: list) -> list[Value | Unread]:
        """What an operation's results stand for; args and kwargs hold values in place of tensors."""
        refusal: Exception | None = None
        given = op.bound(args, kwargs)
        if op.of_channels:
            picked = self.picked(op, given, shapes)
            if picked is not None:
                return picked
        if op.name in _FILTERING:
            own = given["input"].dtype if isinstance(given["input"], Loose) else self.dtype
            fitting = (own, torch.float32) if "batch_norm" in op.name else (own,)
            other = next((v.dtype for v in given.values() if isinstance(v, Tensor) and v.dtype not in fitting), None)
            if other is not None:  # which torch refuses where there are values
                return [self.unread(f"calls {op.label} with parameters of {other} on maps of {own}")] * len(shapes)
        if op.rule is not None and shapes[0].dtype == self.dtype:
            try:
                made = op.rule(*args, **kwargs)
                values = []
                for which, part in enumerate(made if isinstance(made, tuple) else (made,)):
                    if isinstance(part, Unknown):
                        part = self.other_result(op, given, shapes, which, str(part))
                    elif isinstance(part, Stage):
                        self.note(op.name, args, kwargs)
                        part = self.named(part, op.name)
                    values.append(part)
                return values
            except (Unknown, TypeError) as error:
                refusal = error
            except ShapeError as error:
                self.misfit(error)
        try:
            return self.expressions(op, given, shapes)
        except Unknown as error:
            why = str(error) or (str(refusal) if refusal is not None else "")
            text = op.unknown
            if op.rule is not None or op.name in whole.RULES:
                text = f"calls {op.label} in a way that the engines do not read" + (f" ({why})" if why else "")
            return [self.unread(text, error)] * len(shapes)

    def expressions(self, op: Operator, given: dict, shapes: list) -> list[Value]:
        """The results as operations on whole maps."""
        first = next(iter(given.values()))
        if op.name in _IDENTITIES and isinstance(first, Value):
            return [first]
        rule = whole.RULES.get(op.name)
        if rule is None:
            raise Unknown
        call = whole.Call(op.name, dict(given), self.images)
        call.results, call.choose = shapes, self.choose
        own = rule(call)
        if call.name != op.name:
            op = operator(getattr(torch.ops.aten, call.name).default)
        self.note(call.name, call.given, {})
        positional, named = op.unbound(call.given)
        run = Loose(op.function, positional, named, (), self.dtype, 0) if len(shapes) > 1 or op.lists else None
        values = []
        for which, shape in enumerate(shapes):
            length = shape.shape[own.axis] if own.axis < shape.dim() else -1
            if length != own.length(self.images):
                raise Unknown("it changes the batch axis")
            place = (tuple(shape.shape), shape.dtype, *own)
            if run is not None:
                expression = Loose(_part, (run, which), {}, *place)
            else:
                expression = Loose(op.function, positional, named, *place, _each_of(rule, call))
            values.append(self.settled(expression, call.name))
        return values

    def choose(self, places: list[whole.Axis]) -> whole.Axis:
        """Which of several axes the images are on. Of one image it may be any; then it is the one that it was of more."""
        if self.guide is None or len(self.choices) >= len(self.guide):
            found = places[0]
        else:
            found = self.guide[len(self.choices)]
            found = found if found in places else places[0]
        self.choices.append(found)
        return found

    def other_result(self, op: Operator, given: dict, shapes: list, which: int, why: str) -> Value | Unread:
        """One of several results, of which another is a stage."""
        try:
            return self.expressions(op, given, shapes)[which]
        except Unknown:
            return self.unread(f"calls {op.label} in a way that the engines do not read ({why})")

    def settled(self, expression: Loose, name: str) -> Value:
        """A stage, if the images come first and it is of the model's dtype."""
        if not expression.plain or expression.dtype != self.dtype:
            return expression
        self.materialise(expression)
        (inputs, run), shape = expression.run(), expression.shape[1:]
        jumps = jump_of(expression, run)
        if expression.each is not None and len(inputs) == 1:
            stage = aten.pointwise(inputs[0], run)
        elif expression.function is torch.ops.aten.reshape.default and inputs == [expression.args[0]]:
            x = inputs[0]
            if x.shape == shape:
                return x
            stage = aten.whole([x], lambda x: x.reshape(len(x), *shape), shape, flat=len(shape) == 1)
        else:
            stage = aten.whole(inputs, run, shape)
        if jumps is not None:
            stage.options["jumps"] = jumps
        if name in _OWN_STATISTICS:
            stage.options["statistics"] = True
        return self.named(stage, name)

    def materialise(self, expression: Loose) -> None:
        """Picked channels in an expression become the stages that they stand for."""
        queue = [expression]

        def made(leaf):
            if isinstance(leaf, Picked):
                return self.named(aten.as_stage(leaf), "index")
            if isinstance(leaf, Loose):
                queue.append(leaf)
            return leaf

        while queue:
            part = queue.pop()
            if not part.read:
                part.read = True
                part.args = replaced(part.args, made)
                part.kwargs = {key: replaced(value, made) for key, value in part.kwargs.items()}

    def picked(self, op: Operator, given: dict, shapes: list) -> list[Value] | None:
        """Views that touch the axes between the images and the rows alone: channels in another order or number."""
        value = given["self"]
        if isinstance(value, Stage) and len(value.shape) == 3:
            value = Picked(value, torch.arange(value.shape[0], device="cpu"))
        if not isinstance(value, Picked):
            return None
        for shape in shapes:
            if shape.dim() < 3 or shape.shape[0] != self.images or tuple(shape.shape[-2:]) != value.stage.shape[1:]:
                return None
        inner = [tuple(shape.shape[1:-2]) for shape in shapes]
        indices = aten.picked_channels(op.name, value.index, given, inner)
        if indices is None or [tuple(i.shape) for i in indices] != inner or any(0 in i.shape for i in indices):
            return None
        self.note(op.name, {k: v for k, v in given.items() if k not in ("size", "shape", "sizes")}, {})
        return [aten.simplest(Picked(value.stage, i)) for i in indices]

    # -- other ways to make and to change memory

    def in_place(self, op: Operator, args: tuple, kwargs: dict) -> object:
        """An operation that writes: its value, and then the write."""
        given = op.bound(args, kwargs)
        if op.name in _REMAKING:
            if op.name == "detach_" and not self.gradient:
                return args[0]
            self.stop(op.unknown)
        target = given[op.written[0]]
        if not isinstance(target, Tensor):
            self.stop(op.unknown)
        plain = op.functional()
        if self.gradient and not (torch.is_grad_enabled() or self.inside):
            value = self.unread(f"calls {op.label} under no_grad(), so that no gradient passes")
        elif plain is not None and len(op.written) == 1:
            left = {k: self.values(v) for k, v in given.items() if k not in op.written or k == "self"}
            value = self.overwriting(op, plain, target, left)
        else:
            value = self.unread(op.unknown)
        if self.example is not None:
            op.function(*with_tensors(args, self.current), **with_tensors(kwargs, self.current))
        for name in op.written:
            for t in tensors_in([given[name]]):
                self.write(t, value)
                self.known(t).blank = False
        return op.as_given(given, target)

    def overwriting(self, op: Operator, plain: Operator, target: Tensor, given: dict) -> Value | Unread:
        """What an operation leaves in its target."""
        shapes = [_Shape(tuple(target.shape), target.dtype)]
        if op.name == "copy_":
            source = given["src"]
            if isinstance(source, Unread):
                return source
            if isinstance(source, Value):
                source = self.cast(source, target.dtype)
                if whole.shape_of(self.images, source) == shapes[0].shape:
                    return source
                expand = operator(torch.ops.aten.expand.default)
                return self.values_of(expand, (source, list(target.shape)), {}, shapes)[0]
            if isinstance(given["self"], Value):  # a constant, or a number; aten.copy has no derivative
                never = torch.zeros((), dtype=torch.bool, device=self.device)
                source = torch.as_tensor(source, dtype=target.dtype, device=self.device)
                where = operator(torch.ops.aten.where.self)
                return self.values_of(where, (never, given["self"], source), {}, shapes)[0]
        lost = _unread_in(tuple(given.values()))
        if lost is not None:
            return lost
        if not any(isinstance(v, Value) for v in leaves(given)):
            return self.unread(f"calls {op.label} in a way that the engines do not read")
        positional, named = plain.unbound(dict(zip((name for name, _, _ in plain.arguments), given.values(), strict=True)))
        if plain.rule is not None and target.dtype == self.dtype and self.usual(positional):
            stage = self.at_once(plain, positional, named)
            if stage is not None and stage.shape == shapes[0].shape[1:]:
                return stage
        made = self.shapes(plain, with_tensors(positional, self.meta, Value), with_tensors(named, self.meta, Value))
        if tuple(made[0].shape) != shapes[0].shape:
            return self.unread(f"calls {op.label} in a way that the engines do not read")
        return self.cast(self.values_of(plain, positional, named, made)[0], target.dtype)

    def meta(self, value: Value) -> Tensor:
        """What a value looks like, on the meta device."""
        dtype = value.dtype if isinstance(value, Loose) else self.dtype
        return torch.empty(whole.shape_of(self.images, value), dtype=dtype, device="meta")

    def cast(self, value: Value | Unread, dtype: torch.dtype) -> Value | Unread:
        """A value as what is written into a tensor of this dtype."""
        if isinstance(value, Unread) or (value.dtype if isinstance(value, Loose) else self.dtype) == dtype:
            return value
        place = (whole.shape_of(self.images, value), dtype, *whole.axis_of(value))
        return self.settled(Loose(torch.ops.aten._to_copy.default, (value,), {"dtype": dtype}, *place), "copy_")

    def maybe_copied(self, op: Operator, args: tuple, kwargs: dict) -> object:
        """reshape, flatten, contiguous, to: a view or a copy, which strides that are not known decide."""
        source, dtype = args[0], args[0].dtype
        if op.name in ("to", "_to_copy"):
            given = op.bound(args, kwargs)
            other = given.get("other")
            like = other if isinstance(other, Tensor) else source
            dtype, device = given.get("dtype") or like.dtype, torch.device(given.get("device") or like.device)
            if device.type != source.device.type or device.index not in (None, source.device.index):
                self.stop(f"moves a map to {device}")
            if dtype == source.dtype and not given.get("copy") and given.get("memory_format") is None and op.name == "to":
                return source
            shape = _Shape(tuple(source.shape), dtype)
        elif op.name in ("contiguous", "type_as"):
            dtype = args[1].dtype if op.name == "type_as" else dtype
            if dtype == source.dtype and op.name == "type_as":
                return source
            shape = _Shape(tuple(source.shape), dtype)
        else:
            try:
                shape = op.function(torch.empty(source.shape, dtype=dtype, device="meta"), *with_tensors(args[1:], _meta), **kwargs)
            except RuntimeError as error:
                self.misfit(ShapeError(f"images: their map {tuple(source.shape[1:])} does not take this shape: {error}"))
        value = self.value_of(source)
        if isinstance(value, Unread):
            result: Value | Unread = value
        elif dtype != source.dtype:
            result = self.cast(value, dtype)
        elif tuple(shape.shape) == tuple(source.shape):
            result = value
        else:
            result = self.values_of(op, (value, *self.values(args[1:])), kwargs, [shape])[0]
        if self.example is not None:
            made = op.function(*args, **kwargs).clone()
        else:
            made = torch.empty(shape.shape, dtype=dtype, device=source.device)
        memory = self.put(made, result)
        if dtype == source.dtype:
            memory.link(self.memory(source))
        return made

    def squeezes_images(self, op: Operator, args: tuple, kwargs: dict) -> bool:
        value, given = self.value_of(args[0]), op.bound(args, kwargs)
        if isinstance(value, Unread):
            return False
        dims = given.get("dim", range(args[0].dim()))
        return whole.axis_of(value).axis in [d % args[0].dim() for d in ([dims] if isinstance(dims, int) else dims)]

    def not_read(self, op: Operator, args: tuple, kwargs: dict, why: str) -> object:
        """Results that are not read, though their memory may be that of a map."""
        lost, shapes = self.unread(why), self.shapes(op, args, kwargs)
        made, tensors = self.made(op, args, kwargs, shapes)
        if self.example is not None:
            tensors = [t.clone() for t in tensors]
            made = op.structured(tensors)
        sources = [m for t in tensors_in(args) if (m := self.memory(t)) is not None and m.read]
        for t in tensors:
            memory = self.put(t, lost)
            for source in sources:
                memory.link(source)
        return made

    # -- names

    def named(self, stage: Stage, label: str) -> Stage:
        """A stage made here: its place, and its name until a module returns it."""
        if not stage.index and stage is not self.image:
            for source in stage.inputs:
                self.named(source, label)
            self.stages += 1
            stage.index = self.stages
            stage.name = f"{self.paths.get(self.scopes[-1], '')}:{label}"
        return stage

    def note(self, name: str, args: object, kwargs: dict) -> None:
        """What must be the same, however many images there are."""
        self.log.append((name, args, kwargs))


_HOLDING = (Tensor, tuple, list)
_SIZING = frozenset(("reshape", "expand"))  # the rules' names for what gives sizes, the number of images among them


class _Unseen:
    __slots__ = ("off", "record")

    def __init__(self, record: Record):
        self.record = record

    def __enter__(self) -> None:
        self.record.quiet += 1
        self.off = torch._C.DisableTorchFunction()
        self.off.__enter__()

    def __exit__(self, *error: object) -> None:
        self.off.__exit__(*error)
        self.record.quiet -= 1


_FILTERING = frozenset((
    "conv2d", "convolution", "_convolution", "linear", "batch_norm", "_native_batch_norm_legit_no_training",
))  # fmt: skip
_OWN_STATISTICS = frozenset(("group_norm", "native_group_norm", "instance_norm"))
_IDENTITIES = frozenset((
    "clone", "alias", "detach", "lift_fresh", "lift", "resolve_conj", "resolve_neg", "positive",
))  # fmt: skip
# They change what a tensor is, and not only its values.
_REMAKING = frozenset((
    "set_", "resize_", "resize_as_", "squeeze_", "unsqueeze_", "transpose_", "t_", "detach_", "swapdims_", "swapaxes_",
    "requires_grad_", "as_strided_", "rename_", "sparse_resize_",
))  # fmt: skip


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _blank(t: Tensor) -> Tensor:
    """As this tensor is, but a constant."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _as_places(index: object) -> object:
    """A mask over one axis as the places where it is set."""
    if isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == 1:
        return index.nonzero().flatten()
    return index


def _unread_in(given: tuple) -> Unread | None:
    for leaf in given:
        kind = type(leaf)
        if kind is Unread:
            return leaf
        if (kind is tuple or kind is list) and leaf and type(leaf[0]) is not int:
            found = _unread_in(leaf)
            if found is not None:
                return found
        elif kind is dict and leaf:
            found = _unread_in(tuple(leaf.values()))
            if found is not None:
                return found
    return None


def _each_of(rule: Callable, call: whole.Call) -> Stage | None:
    """The stage that an operation on each value reads, where it reads nothing else but numbers."""
    found = None
    for value in call.given.values() if rule in (whole.elementwise, whole.put) else ():
        for part in whole.flat(value):
            if isinstance(part, Stage | Loose):
                own = part if isinstance(part, Stage) else part.each
                if own is None or found not in (None, own) or call.shape(part)[1:] != own.shape:
                    return None
                found = own
            elif isinstance(part, Picked | Alike) or (isinstance(part, Tensor) and part.dim()):
                return None
    return found


def _itself(x: Tensor) -> Tensor:
    return x


def _applied_to_copies(own: type, *args: object, **kwargs: object) -> object:
    """A custom autograd function that works in place, on values that others may read."""
    return own.apply(*with_tensors(args, Tensor.clone), **with_tensors(kwargs, Tensor.clone))


def _part(parts: object, which: int) -> Tensor:
    return [p for p in leaves(parts) if isinstance(p, Tensor)][which]


def _written(base: Tensor, value: Tensor, steps: list) -> Tensor:
    """A copy of the base with a part of it replaced."""
    base = base.clone(memory_format=torch.contiguous_format)
    view = base
    for function, args, which in steps:
        if isinstance(made := function(view.detach(), *args), Tensor):
            view = function(view, *args)
        else:  # autograd forbids writes to one of several views
            view = view.as_strided(made[which].shape, made[which].stride(), made[which].storage_offset())
    view.copy_(value)
    return base


def alike(one: list[tuple], other: list[tuple], single: bool = False) -> bool:
    """Whether two records did the same. single: one of them of one image, which does not show its axis."""
    if [entry[0] for entry in one] != [entry[0] for entry in other]:
        return False
    if single:
        one, other = ([entry for entry in log if entry[0] not in _SIZING] for log in (one, other))
    here, there = list(leaves(replaced_values(one))), list(leaves(replaced_values(other)))
    if len(here) != len(there):
        return False
    for a, b in zip(here, there, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if single:
                a, b = a.flatten(), b.flatten()
            if a is not b and not (a.shape == b.shape and whole.same(a, b)):
                return False
        elif type(a) is not type(b) or (a != b and a == a):
            return False
    return True


def replaced_values(log: list[tuple]) -> object:
    """A log as it is compared: what is computed from the images plays no part."""

    def noted(leaf: object) -> object:
        if isinstance(leaf, Alike):
            return leaf.part
        return "value" if isinstance(leaf, Value | Unread) else leaf

    return [(name, replaced(list(args.values()) if isinstance(args, dict) else args, noted),
             replaced(list(kwargs.values()), noted)) for name, args, kwargs in log]  # fmt: skip
