"""A module or function of one's own as a prior."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvq._check import require_shape
from fastvq._evaluation import in_evaluation
from fastvq._files import first_line
from fastvq._watch import Snapshot, contents_of
from fastvq.errors import ArgumentError, FastvqError, TraceError
from fastvq.models.prior import Condition, Prior, PriorConfig
from fastvq.sampling.own.base import BATCH, Meeting
from fastvq.sampling.own.builder import Feature, GivenValues, PlanBuilder
from fastvq.sampling.own.causal import require_causal
from fastvq.sampling.own.record import Recorder
from fastvq.sampling.own.settings import settings_of
from fastvq.sampling.own.tensors import Replayer
from fastvq.sampling.plan import Graph, Op, schedule, writes
from fastvq.sampling.plan.evaluate import plan_logits
from fastvq.sampling.plan.form import extent

# Of the largest logit: what float32 may round differently in another order of sums, with room for deep networks.
_ROUNDING = 2e-4
# Labels whose features are worked out together.
_TOGETHER = 256


class Told(NamedTuple):
    """Condition and label as they were given."""

    condition: tuple[Tensor, ...]
    label: Tensor | None


@dataclass(frozen=True, eq=False)
class Traced:
    """A network as operations of a plan, and what it was made from."""

    weights: Snapshot
    ops: list[Op]
    output: int
    constants: dict[str, Tensor]
    normalised: bool = False
    meetings: Sequence[Meeting] = ()
    doubts: Sequence[str] = ()
    values: Mapping[str, GivenValues] = field(default_factory=dict)
    by_label: dict[str, Tensor] = field(default_factory=dict)


class _Kept:
    """The last trace, shared by copies of a prior that differ in mode alone."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.traced: Traced | None = None
        self.obstacle: str | None = None
        self.settings: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        """Copies of a prior trace anew."""
        return _Kept, ()


class OwnPrior(Prior):
    """A prior whose logits come from a module or function: ``codes -> logits``.

    It is called as ``module(codes)``, ``module(codes, label)``, ``module(codes, condition)`` or
    ``module(codes, condition, label)``, as ``num_classes`` and ``condition_shapes`` say, with codes int64 [B, H, W] of
    whole grids, and has to give [B, K, H, W]. The condition is a tensor [B, h, w], or a tuple of several levels' ones.

    Args:
        module: the network. Of a function that is no module nothing is known but what it returns: changes of weights
            are not noticed, and its mode stays what it is.
        config: grids, codes, classes and levels above; the other fields are not read.
        untraced: why it is not to be written as a plan; then only the naive engine runs it.
        write: writes the plan by hand, instead of a trace: given a builder, gives the feature that is the logits.
    """

    _changes: Tensor

    def __init__(
        self,
        module: Callable[..., Tensor],
        config: PriorConfig,
        *,
        untraced: str | None = None,
        write: Callable[[PlanBuilder], Feature] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._write = write
        self.config = config
        self.context_encoder = None
        if isinstance(module, nn.Module):
            self.module = module
        else:
            self._function = module
        if next(self.parameters(), None) is None:
            self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._kept, self._untraced = _Kept(), untraced
        # Plans are kept for tensors that stay as they are. This one changes where other things do.
        self.register_buffer("_changes", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def network(self) -> Callable[..., Any]:
        """The module or function that gives logits."""
        found = self._modules.get("module")
        return self._function if found is None else found

    def save_pretrained(self, folder: Any, *, overwrite: bool = False) -> Any:
        """Refused: only the network's own code can build it again.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("save_pretrained: this prior is a module of your own, which only your code can build again")

    def context(self, condition: Condition, label: Tensor | None, *, batch: int) -> Any:
        return Told(self.check_condition(condition, batch), self.check_label(label, batch))

    def logits(self, codes: Tensor, context: Any) -> Tensor:
        codes = self.check_codes(codes)
        rows, (height, width) = codes.shape[1], self.config.shape
        # Rows below are of no consequence, and networks may know only whole grids.
        whole = nn.functional.pad(codes, (0, 0, 0, height - rows)) if rows < height else codes
        found = self.network(*self.arguments(whole, context))
        if not isinstance(found, Tensor):
            raise ArgumentError(f"prior: expected logits as a tensor, got {type(found).__name__}")
        require_shape("prior: logits", found, [len(codes), self.config.num_codes, height, width])
        return found[:, :, :rows]

    def require_call(self) -> None:
        """Call the network once, as it will be.

        Raises:
            ArgumentError: see :meth:`try_out`.
        """
        with torch.no_grad():
            in_evaluation(self).try_out(*self._example(BATCH))

    def try_out(self, codes: Tensor, context: Told) -> None:
        """The network must take ``codes`` and ``context``.

        Raises:
            ArgumentError: the network cannot be called so.
        """
        try:
            self.logits(codes, context)
        except FastvqError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            given = [f"codes {list(codes.shape)} in 0..{self.config.num_codes - 1}"]
            given += [f"a condition {list(one.shape)}" for one in context.condition]
            given += [] if context.label is None else [f"labels [{len(context.label)}]"]
            raise ArgumentError(
                f"prior: calling it with {' and '.join(given)} failed: {first_line(error)}. num_codes= and "
                "num_classes= say what it takes; a network that takes codes of other levels is given to fastvq.trace, "
                "with condition_shapes= and condition_num_codes="
            ) from error

    def arguments(self, codes: Any, context: Told) -> list[Any]:
        """What the network is called with for ``codes`` and ``context``."""
        condition: list[Any] = list(context.condition)
        given: list[Any] = [] if not condition else [condition[0] if len(condition) == 1 else tuple(condition)]
        return [codes, *given, *([] if context.label is None else [context.label])]

    def why_no_plan(self) -> str | None:
        """Why there is no plan of this prior, or None."""
        if self._untraced is not None:
            return self._untraced
        self._look_again()
        if self._kept.obstacle is None:
            try:
                self.traced()
            except TraceError as error:
                self._kept.obstacle = str(error).removeprefix("module: ")
                self._kept.settings = self._settings()
        return self._kept.obstacle

    def _settings(self) -> tuple[object, ...]:
        network = self.network
        return settings_of(network) if isinstance(network, nn.Module) else ()

    def _look_again(self) -> None:
        """Forget what is kept if anything but weights has changed, and with it what the network computes."""
        kept = self._kept
        if kept.traced is None and kept.obstacle is None:
            return
        if kept.settings == self._settings():
            return
        with kept.lock, torch.no_grad():
            try:
                if kept.traced is not None:
                    in_evaluation(self)._check(kept.traced)
            except (FastvqError, RuntimeError, TypeError):
                kept.traced = None
                self._changes.add_(1)
            kept.obstacle, kept.settings = None, self._settings()

    def traced(self) -> Traced:
        """The network as it is now, followed and checked.

        Raises:
            TraceError: it cannot be written as a plan, or computes something else than that does.
            CausalityError: logits depend on codes that are not known.
        """
        kept = self._kept
        _, tensors = contents_of(self)
        found = kept.traced
        if found is not None and found.weights.matches(tensors):
            return found
        with kept.lock:
            found = kept.traced
            if found is None or not found.weights.matches(tensors):
                # The first pass may change weights, as masks do that are applied in each.
                with torch.no_grad():
                    found = in_evaluation(self)._traced()
                kept.traced, kept.settings = found, self._settings()
            return found

    def statics(self, condition: Condition, label: Tensor | None, *, batch: int) -> dict[str, Tensor]:
        traced = self.traced()
        told = self.context(condition, label, batch=batch)
        return {**traced.constants, **in_evaluation(self)._met(traced, told, batch)}

    # What follows is called on a prior in evaluation mode.

    def _example(self, batch: int, seed: int = 0) -> tuple[Tensor, Told]:
        """Random codes, conditions and labels."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        device = next(self.parameters()).device

        def draw(count: int, *shape: int) -> Tensor:
            return torch.randint(count, (batch, *shape), generator=generator).to(device)

        condition = [draw(k, *s) for k, s in zip(config.condition_num_codes, config.condition_shapes, strict=True)]
        label = None if config.num_classes is None else draw(config.num_classes)
        return draw(config.num_codes, *config.shape), Told(tuple(condition), label)

    def _traced(self) -> Traced:
        small = next((w.dtype for w in self.parameters() if w.dtype in (torch.float16, torch.bfloat16)), None)
        if small is not None:
            raise TraceError(f"module: has weights in {small}, and plans compute in float32; give module.float()")
        codes, told = self._example(BATCH)
        self.try_out(codes, told)
        try:
            found = self._record(Snapshot(contents_of(self)[1]))
            self._check(found)
        except TraceError:
            require_causal(self)  # a leak is what has to be mended first
            raise
        return found

    def _record(self, weights: Snapshot) -> Traced:
        config, device = self.config, next(self.parameters()).device
        if self._write is not None:
            builder = PlanBuilder(config.shape, config.num_codes, device)
            logits = builder.output(self._write(builder))
            made = builder.emitter
            return Traced(weights, made.graph.ops, logits, made.constants, values=builder.values)
        network = self.network
        names = {} if not isinstance(network, nn.Module) else {id(m): name for name, m in network.named_modules()}
        like = next((w for w in self.parameters() if w.is_floating_point()), torch.zeros((), device=device))
        recorder = Recorder(config.shape, config.num_codes, like, names)
        _, told = self._example(BATCH)
        given = Told(
            tuple(recorder.given(codes) for codes in told.condition),
            None if told.label is None else recorder.given(told.label),
        )
        try:
            output = recorder.output(network(*self.arguments(recorder.codes(), given)))
        except FastvqError:
            raise
        except Exception as error:  # it ran on numbers a moment ago
            raise TraceError(f"module: cannot be traced: {first_line(error)}") from error
        made, normalised = recorder.emitter, recorder.normalised
        return Traced(weights, made.graph.ops, output, made.constants, normalised, recorder.meetings, recorder.doubts)

    def _met(self, traced: Traced, told: Told, batch: int) -> dict[str, Tensor]:
        """The static operations that depend on condition or label."""
        if not traced.meetings and not traced.values:
            return {}
        classes = self.config.num_classes
        # Features of all positions would be too many to keep of every class.
        everywhere = all(meeting.everywhere for meeting in traced.meetings)
        if told.condition or classes is None or told.label is None or traced.values or not everywhere:
            return self._replayed(traced, told, batch)
        if not traced.by_label:
            # All of them once, so that a label's features do not depend on what it is asked for with.
            labels = torch.arange(classes, device=told.label.device).split(_TOGETHER)
            every = [self._replayed(traced, Told((), some), len(some)) for some in labels]
            traced.by_label.update({name: torch.cat([one[name] for one in every]) for name in every[0]})
        return {name: table[told.label] for name, table in traced.by_label.items()}

    def _replayed(self, traced: Traced, told: Told, batch: int) -> dict[str, Tensor]:
        if traced.values:
            found = {name: values(*told).float() for name, values in traced.values.items()}
            for name, one in found.items():
                sizes = [1, 1] if extent(name) == "label" else self.config.shape
                channels = next(op.channels for op in traced.ops if op.variant == name)
                require_shape("values of given", one, [batch, channels, *sizes])
            return found
        replayer = Replayer(next(self.parameters()).device)
        given = Told(
            tuple(replayer.given(codes) for codes in told.condition),
            None if told.label is None else replayer.given(told.label),
        )
        with torch.inference_mode(False), torch.no_grad():
            self.network(*self.arguments(replayer.codes((batch, *self.config.shape)), given))
        return {meeting.name: meeting.of(replayer.met, batch) for meeting in traced.meetings}

    def _check(self, traced: Traced) -> None:
        """Compare the plan with the network.

        Raises:
            TraceError: logits differ.
        """
        plan = schedule(traced.ops, traced.output, self.config.shape, self.config.num_codes)
        codes, told = self._example(3, seed=1)
        wanted = self.logits(codes, told).float()
        found = plan_logits(plan, codes, {**traced.constants, **self._met(traced, told, 3)})
        if not bool(wanted.isfinite().all()):
            raise TraceError("module: its logits are not finite for random codes")
        if traced.normalised:
            wanted, found = (x.log_softmax(1) for x in (wanted, found))
        off = (found - wanted).abs()
        bound = _ROUNDING * float(wanted.abs().max())
        if not float(off.max()) <= bound:
            sample, code, row, column = (int(i) for i in torch.unravel_index(off.argmax(), off.shape))
            raise TraceError(
                f"module: its plan gives other logits, {found[sample, code, row, column]:.6g} in place of "
                f"{wanted[sample, code, row, column]:.6g} for code {code} at row {row}, column {column}"
                + (f"; it cannot have {traced.doubts[0]}" if traced.doubts else "")
            )


@writes(OwnPrior, {OwnPrior: {}}, why_not=OwnPrior.why_no_plan)
def write(graph: Graph, prior: OwnPrior) -> int:
    traced = prior.traced()
    for op in traced.ops:
        graph.add_op(op)
    return traced.output
