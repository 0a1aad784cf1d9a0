"""The backends of causal convolution, for arguments that the public functions have checked.

On a CPU a convolution with a masked kernel spends up to half of its time on zeros. Here the whole rows of the kernel
and what is read of the current row are two library convolutions over channels-last memory, whose results are added in
place. Columns beyond the grid are left to the library's own padding, which skips them; rows above it are copied in,
since padding could only be had on both sides. Where both would be small, what every position reads is gathered instead
for one matrix product: there the calls themselves cost more than the copies.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.ops.causal_grid import Taps, read_taps
from fastvq.ops.causal_reference import activate
from fastvq.ops.dispatch import select_causal_conv2d

Gradients = tuple[Tensor, Tensor, Tensor]

# Elements from which a transposed copy is worth a call of its own.
_IMAGE = 4096
# Elements up to which gathering them is quicker than two convolutions, with one thread or two.
_GATHERED = 1 << 17
_GATHERED_DTYPES = (torch.float32, torch.float64)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    residual: Tensor | None,
    mask: str,
    form: str,
    activation: str | None,
    gate: bool,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W]; otherwise an empty tensor."""
    out, pre_gate = run(x, weight, bias, context, residual, mask, form, activation, gate, keep, backend)
    return out, x.new_empty(0) if pre_gate is None else pre_gate


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    residual: Tensor | None,
    mask: str,
    form: str,
    activation: str | None,
    gate: bool,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """`forward`, with None for what is not kept: an operation that is registered cannot return that."""
    chosen = select_causal_conv2d(x, weight, backend)
    if chosen == "triton":
        from fastvq.kernels import causal_conv as kernels

        # The kernel writes x's type; under autocast the residual may be wider.
        fits = residual is None or residual.dtype == x.dtype
        out, pre_gate = kernels.forward(
            x, weight, bias, mask=mask, form=form, activation=activation, context=context, gate=gate,
            residual=residual if fits else None, keep_pre_gate=keep, precision=_precision(),
        )  # fmt: skip
        if residual is not None and not fits:
            out = out + residual
        return channels_last(out), pre_gate
    out = _convolve(activate(x, activation), weight, bias, read_taps(weight.shape[-1], mask, form))
    if context is not None:
        out += context
    pre_gate = out
    if gate:
        out = F.glu(pre_gate, dim=1)
    if residual is not None:
        out = out.add_(residual) if residual.dtype == out.dtype else out + residual
    return channels_last(out), channels_last(pre_gate) if gate and keep else None


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: str,
    form: str,
    activation: str | None,
    needs_input: bool,
    needs_weight: bool,
    backend: str | None,
) -> Gradients:
    """Gradients of x, weight and bias from that of the convolution's result; an empty tensor for what is not needed."""
    chosen = select_causal_conv2d(x, weight, backend)
    nothing = grad.new_empty(0)
    of_x, of_weight, of_bias = nothing, nothing, nothing.clone()
    if chosen == "triton":
        from fastvq.kernels import causal_conv as kernels
        from fastvq.kernels import causal_conv_weight as weight_kernels

        options = {"mask": mask, "form": form, "activation": activation, "precision": _precision()}
        if needs_input:
            of_x = kernels.backward_input(grad, x, weight, **options)
        if needs_weight:
            of_weight, of_bias = weight_kernels.backward_weight(grad, x, kernel_size=weight.shape[-1], **options)
        return of_x, of_weight, of_bias
    activated = activate(x, activation)
    taps = read_taps(weight.shape[-1], mask, form)
    of_x, of_weight, of_bias = _gradients(grad, activated, weight, taps, needs_input, needs_weight)
    if needs_input and activation is not None:
        of_x = _through_activation(of_x, activated, activation)
    return channels_last(of_x) if needs_input else of_x, of_weight, of_bias


def gate_backward(grad: Tensor, pre_gate: Tensor, backend: str | None) -> Tensor:
    """Gradient [B, O, H, W] of what is gated, from that of the gate's result."""
    chosen = select_causal_conv2d(grad, pre_gate, backend)
    if chosen == "triton":
        from fastvq.kernels import causal_conv as kernels

        return kernels.gate_backward(grad, pre_gate)
    return channels_last(torch.ops.aten.glu_backward(channels_last(grad), pre_gate, 1))


def channels_last(x: Tensor) -> Tensor:
    """The values in channels-last memory, whose strides are those of [B, H, W, C] even where sizes are 1."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    batch, channels, height, width = x.shape
    if x.device.type == "cpu" and x.is_contiguous() and min(channels, height * width) > 1 and x[:1].numel() >= _IMAGE:
        # PyTorch transposes matrices three times as fast as it permutes axes.
        out = x.new_empty(batch, height, width, channels)
        for image, transposed in zip(x, out, strict=True):
            transposed.view(-1, channels).copy_(image.view(channels, -1).t())
        return out.permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps) -> Tensor:
    """[B, O, H, W] in memory of its own."""
    if _in_float32(x):
        return _convolve(x.float(), weight.float(), None if bias is None else bias.float(), taps).to(x.dtype)
    x = channels_last(x)
    batch, channels, height, width = x.shape
    above, left, current = taps
    kernel = weight.shape[-1]
    if kernel == 1 and current and x.numel():
        return F.conv2d(x, weight, bias)
    # Rows of the kernel that are above the whole grid are left out.
    first, last = kernel * max(0, above + 1 - height), above * kernel + current
    size = batch * height * width * channels * (last - first)
    if x.is_cpu and x.dtype in _GATHERED_DTYPES and 0 < size <= _GATHERED:
        # One row for each position, and one of zeros for what lies outside the grid.
        rows = F.pad(x.permute(0, 2, 3, 1).view(batch, height * width, channels), (0, 0, 0, 1))
        read = rows.index_select(1, _sources(height, width, kernel, taps)).view(batch, height, width, -1)
        matrix = weight.flatten(2)[:, :, first:last].transpose(1, 2).reshape(-1, read.shape[-1])
        return F.linear(read, matrix, bias).permute(0, 3, 1, 2)
    out = None
    if x.numel() and current:
        out = F.conv2d(_padded(x, left, current - left - 1, 0, 0), weight[:, :, above : above + 1, :current], bias)
    if out is None:
        out = channels_last(x.new_zeros(batch, weight.shape[0], height, width))
        out = out if bias is None else out.add_(bias[:, None, None])
    if x.numel() and above and height > 1:
        # The output of row r comes from rows r - above .. r - 1: row 0 has none, and the last row is not read.
        rows = F.conv2d(_padded(x, 0, 0, above - 1, -1), weight[:, :, :above], padding=(0, left))
        out[:, :, 1:] += rows[..., :width]
    return out


@functools.lru_cache(maxsize=256)
def _sources(height: int, width: int, kernel: int, taps: Taps) -> Tensor:
    """[H * W * T]: which position each tap of each position reads, H * W outside the grid.

    Of the taps those above the whole grid are left out.
    """
    # A tensor of inference mode could not be used outside it later.
    with torch.inference_mode(False):
        first, last = kernel * max(0, taps.above + 1 - height), taps.above * kernel + taps.current
        tap = torch.arange(first, last, device="cpu")
        row = torch.arange(height, device="cpu")[:, None, None] + tap // kernel - taps.above
        column = torch.arange(width, device="cpu")[:, None] + tap % kernel - taps.left
        inside = (row >= 0) & (column >= 0) & (column < width)
        return torch.where(inside, row * width + column, height * width).flatten()


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, taps: Taps, needs_input: bool, needs_weight: bool) -> Gradients:
    """Gradients of `_convolve` with respect to x, weight and bias."""
    if _in_float32(x):
        wide = _gradients(grad.float(), x.float(), weight.float(), taps, needs_input, needs_weight)
        return wide[0].to(x.dtype), wide[1].to(x.dtype), wide[2].to(x.dtype)
    x, grad = channels_last(x), channels_last(grad)
    above, left, current = taps
    of_x, of_weight = grad.new_empty(0), grad.new_empty(0)
    if needs_weight:
        of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if x.numel() and current:
        given = _padded(x, left, current - left - 1, 0, 0)
        part = weight[:, :, above : above + 1, :current]
        found, of_part = _library_gradients(grad, given, part, (0, 0), needs_input, needs_weight)
        if found is not None:
            of_x = _padded(found[..., left:], 0, 1 + left - current, 0, 0)
        if of_part is not None:
            of_weight[:, :, above : above + 1, :current] = of_part
    elif needs_input:
        of_x = torch.zeros_like(x)
    if x.numel() and above and x.shape[2] > 1:
        kernel = weight.shape[-1]
        # An even kernel makes one column more, which nothing depends on.
        below = _padded(grad[:, :, 1:], 0, 2 * left + 1 - kernel, 0, 0)
        given, part = _padded(x, 0, 0, above - 1, -1), weight[:, :, :above]
        found, of_part = _library_gradients(below, given, part, (0, left), needs_input, needs_weight)
        if found is not None:
            of_x[:, :, :-1] += found[:, :, above - 1 :]
        if of_part is not None:
            of_weight[:, :, :above] = of_part
    return of_x, of_weight, grad.sum((0, 2, 3)) if needs_weight else grad.new_empty(0)


def _in_float32(x: Tensor) -> bool:
    """On CPUs products of float16 take several times as long, and two roundings lose more than one."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def _library_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    wanted = [needs_input, needs_weight, False]
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], list(padding), [1, 1], False, [0, 0], 1, wanted
    )
    return found[0], found[1]


def _padded(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """F.pad, but without a copy where nothing changes; a negative number cuts off."""
    return F.pad(x, (left, right, top, bottom)) if left or right or top or bottom else x


def _through_activation(grad: Tensor, activated: Tensor, kind: str) -> Tensor:
    grad = torch.ops.aten.elu_backward(grad, 1, 1, 1, True, activated)
    if kind == "elu":
        return grad
    of_plus, of_minus = grad.chunk(2, dim=1)
    return of_plus - of_minus


def _precision() -> str:
    """Of float32 products on a GPU: as PyTorch's own convolutions are set."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
