"""Building blocks of the priors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq.kernels.taps import CHANNEL_MULTIPLE, read_taps
from fastvq.ops import code_conv2d, fused_causal_conv2d
from fastvq.ops.causal_conv import gated_block
from fastvq.ops.causal_conv.block import Step
from fastvq.ops.causal_conv.reference import activate
from fastvq.ops.grid import Form, Mask

Activation = Literal["elu", "concat_elu"]
ACTIVATIONS: tuple[Activation, ...] = ("elu", "concat_elu")
ConvFactory = Callable[[int, int], nn.Module]
Taps = Sequence[tuple[int, int]]


class CausalConv2d(nn.Module):
    """Masked convolution; see :func:`fastvq.ops.causal_conv2d`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, mask: Mask, form: Form) -> None:
        super().__init__()
        self.mask, self.form = mask, form
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        above = kernel_size - 1 if form == "rows" else kernel_size // 2
        _init_uniform(self, in_channels * (above * kernel_size + kernel_size // 2 + (mask == "inclusive")))

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """Offsets (rows, columns) of the entries of the kernel that are read, row by row."""
        width = self.weight.shape[-1]
        read = read_taps(width, self.mask, self.form)
        places = [(row, column) for row in range(-read.above, 0) for column in range(width)]
        places += [(0, column) for column in range(read.current)]
        return tuple((row, column - read.left) for row, column in places)

    def forward(
        self,
        x: Tensor,
        activation: Activation | None = None,
        context: Tensor | None = None,
        gate: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See :func:`fastvq.ops.fused_causal_conv2d`."""
        return fused_causal_conv2d(
            x,
            self.weight,
            self.bias,
            mask=self.mask,
            form=self.form,
            activation=activation,
            context=context,
            gate=gate,
            residual=residual,
        )


class PointwiseConv2d(nn.Conv2d):
    """1 x 1 convolution that takes what surrounds it in a gated block, as :class:`CausalConv2d` does."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,
        activation: Activation | None = None,
        context: Tensor | None = None,
        gate: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        plain = activation is None and context is None and not gate and residual is None
        # On a GPU the library is slow with odd widths, which ours fills up.
        if plain and not (x.is_cuda and self.in_channels % CHANNEL_MULTIPLE):
            return super().forward(x)
        # A causal kernel of one tap, the current position.
        return fused_causal_conv2d(
            x,
            self.weight,
            self.bias,
            mask="inclusive",
            activation=activation,
            context=context,
            gate=gate,
            residual=residual,
        )


class CodeConv2d(nn.Module):
    """First layer over codes: one learned vector per tap and code; see :func:`fastvq.ops.code_conv2d`."""

    def __init__(self, num_codes: int, out_channels: int, taps: Taps) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.weight = nn.Parameter(torch.empty(len(self.taps), num_codes, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        _init_uniform(self, len(self.taps))

    def forward(self, codes: Tensor) -> Tensor:
        return code_conv2d(codes, self.weight, self.taps, self.bias)


def _init_uniform(layer: CausalConv2d | CodeConv2d, fan_in: int) -> None:
    """PyTorch's default for convolutions, with the taps that are really read as fan-in."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)


def causal_taps(kernel_size: int) -> list[tuple[int, int]]:
    """Offsets of a centred kernel that come before the current position in raster order."""
    reach = kernel_size // 2
    above = [(row, column) for row in range(-reach, 0) for column in range(-reach, reach + 1)]
    return above + [(0, column) for column in range(-reach, 0)]


def centred_taps(kernel_size: int) -> list[tuple[int, int]]:
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    return [(row, column) for row in reach for column in reach]


class GatedBlock(nn.Module):
    """x + a * sigmoid(b), where (a, b) = conv2(act(conv1(act(x)) + aux)) + context (Chen et al. 2017, figure 3).

    Args:
        channels, hidden: width of the trunk and of the inner layer.
        conv: makes a convolution from (in, out) channels; 1 x 1 by default.
        context_channels: width of the conditioning features, 0 for none.
        aux_channels: width of a second input joined after the first convolution, 0 for none.
        dropout: between the two convolutions.
        legacy_skip: add act(x) instead of x; see :class:`fastvq.models.PixelSNAILConfig`.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        conv: ConvFactory | None = None,
        context_channels: int = 0,
        aux_channels: int = 0,
        dropout: float = 0.0,
        activation: Activation = "elu",
        legacy_skip: bool = False,
    ) -> None:
        super().__init__()
        make = conv or pointwise
        widen = 2 if activation == "concat_elu" else 1
        self.activation, self.dropout, self.legacy_skip = activation, dropout, legacy_skip
        self.conv1 = make(widen * channels, hidden)
        self.conv2 = make(widen * hidden, 2 * channels)
        self.aux = nn.Conv2d(widen * aux_channels, hidden, 1) if aux_channels else None
        self.context = nn.Conv2d(context_channels, 2 * channels, 1, bias=False) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None, aux: Tensor | None = None) -> Tensor:
        kind: Activation | None = self.activation
        joined = None if aux is None or self.aux is None else self.aux(activate(aux, self.activation))
        shared = None if context is None or self.context is None else self.context(context)
        first: Activation | None = None if self.legacy_skip else self.activation
        if self.legacy_skip:
            x = activate(x, self.activation)
        if x.is_cuda and not (self.training and self.dropout):
            inner, outer = _step(self.conv1, first, joined), _step(self.conv2, kind, shared, gate=True)
            if inner is not None and outer is not None:
                return gated_block(x, inner, outer)
        h = _surrounded(self.conv1, x, activation=first, context=joined)
        if self.training and self.dropout:
            h, kind = F.dropout(activate(h, self.activation), self.dropout), None
        return _surrounded(self.conv2, h, activation=kind, context=shared, gate=True, residual=x)


def _step(conv: nn.Module, activation: Activation | None, context: Tensor | None, gate: bool = False) -> Step | None:
    """What a convolution does within a block, or None where its module is to be called: of another kind, or hooked."""
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return None
    if type(conv) is CausalConv2d:
        return Step(conv.weight, conv.bias, context, conv.mask, conv.form, activation, gate)
    if type(conv) is PointwiseConv2d:
        return Step(conv.weight, conv.bias, context, "inclusive", "rows", activation, gate)
    return None


def _surrounded(
    conv: nn.Module,
    x: Tensor,
    *,
    activation: Activation | None = None,
    context: Tensor | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gate(conv(activation(x)) + context), in one step where the convolution can."""
    if isinstance(conv, (CausalConv2d, PointwiseConv2d)):
        # By position: nn.Module would pack and unpack names twice.
        return conv(x, activation, context, gate, residual)
    h = conv(x if activation is None else activate(x, activation))
    h = h if context is None else h + context
    h = F.glu(h, dim=1) if gate else h
    return h if residual is None else residual + h


def pointwise(in_channels: int, out_channels: int) -> PointwiseConv2d:
    return PointwiseConv2d(in_channels, out_channels)
