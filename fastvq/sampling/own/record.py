"""A network followed operation by operation, and written down as a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastvq.errors import TraceError
from fastvq.sampling.own import layout as lay
from fastvq.sampling.own.attend import SCORES, Attention
from fastvq.sampling.own.base import BATCH
from fastvq.sampling.own.elementwise import BY_VALUE, REASONS
from fastvq.sampling.own.emit import NotCausal, Untraceable
from fastvq.sampling.own.tensors import Traced, is_given, place
from fastvq.sampling.own.values import Table


class Recorder(Attention):
    """Follows a network and writes it into a graph."""

    def codes(self) -> Traced:
        height, width = self.grid
        values = torch.arange(self.num_codes, device=self.device)[:, None]
        layout = (lay.only("b", BATCH), lay.only("r", height), lay.only("c", width))
        return self._wrap(Table(values, None, 0, 0, height, width), layout)

    def output(self, logits: Any) -> int:
        """The operation that gives logits.

        Raises:
            TraceError: they are none of [B, K, H, W] that depend on the codes.
        """
        height, width = self.grid
        wanted = (lay.only("b", BATCH), lay.only("k", self.num_codes), lay.only("r", height), lay.only("c", width))
        if not isinstance(logits, Traced) or is_given(logits):
            raise TraceError("module: what it returns does not depend on the codes")
        held = self._held(logits)
        if held.layout != wanted:
            raise TraceError(
                f"module: expected logits [B, {self.num_codes}, {height}, {width}], got {list(lay.shape(held.layout))}"
            )
        try:
            return self.emitter.output(self.emitter.merged(self._linear(held.value)))
        except Untraceable as error:
            raise TraceError(f"module: its logits have no plan: {error}") from error

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        self.number(args, kwargs)
        try:
            handler = SCORES.get(name) if self.of_scores(args) else HANDLERS.get(name)
            if handler is not None:
                return handler(self, name, args, kwargs)
            if torch.Tag.pointwise in func.tags or name in BY_VALUE:
                return self._by_value(func, name, args, kwargs)
            raise Untraceable(REASONS.get(name, "no operation of a plan does this"))
        except Untraceable as error:
            raise self._error(name, error) from error

    def whole(self, name: str, args: Any, kwargs: Any) -> Any:
        self.number(args, kwargs)
        try:
            return WHOLE_HANDLERS[name](self, name, args, kwargs)
        except Untraceable as error:
            raise self._error(name, error) from error

    def _error(self, name: str, error: Untraceable) -> TraceError:
        where = place(self._names)
        at = f" in {where}" if where else ""
        kind = "leak" if isinstance(error, NotCausal) else "operation"
        return TraceError(f"module: cannot be traced: {kind} at {name.rstrip('_')}{at}: {error}")


_SAME = ("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "view_as", "dropout")
_LAYOUT = (*_SAME, "view", "_unsafe_view", "expand", "permute", "transpose", "unsqueeze", "squeeze")
_R = Recorder
HANDLERS: dict[str, Callable[[Recorder, str, Any, Any], Any]] = {
    **dict.fromkeys(_SAME, _R._same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "expand", "_reshape_alias"), _R._view),
    **dict.fromkeys(("permute", "transpose", "t"), _R._permute),
    **dict.fromkeys(("unsqueeze", "squeeze"), _R._unsqueeze),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _R._split),
    **dict.fromkeys(("sigmoid", "tanh", "relu", "elu", "leaky_relu", "silu"), _R._function),
    **dict.fromkeys(("sigmoid_", "tanh_", "relu_", "elu_", "leaky_relu_", "silu_"), _R._function),
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), _R._add),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), _R._mul),
    "neg": _R._neg,
    "slice": _R._slice,
    "select": _R._select,
    "chunk": _R._chunk,
    "unbind": _R._unbind,
    "cat": _R._cat,
    "constant_pad_nd": _R._pad,
    "convolution": _R._convolution,
    "mm": _R._mm,
    "addmm": _R._mm,
    "embedding": _R._embedding,
    "bmm": _R._bmm,
    "baddbmm": _R._baddbmm,
    "_scaled_dot_product_flash_attention_for_cpu": _R._library_attention,
    "_log_softmax": _R._log_softmax,
    "native_batch_norm": _R._batch_norm,
    "cudnn_batch_norm": _R._batch_norm,
    "glu": _R._glu,
}
for name in _LAYOUT:
    SCORES[name] = HANDLERS[name]
WHOLE_HANDLERS: dict[str, Callable[[Recorder, str, Any, Any], Any]] = {
    "one_hot": _R._one_hot,
    "scaled_dot_product_attention": _R._whole_attention,
}
