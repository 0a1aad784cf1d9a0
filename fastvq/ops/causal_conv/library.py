"""Masked convolution from PyTorch's own operators.

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
from torch.utils._python_dispatch import _disable_current_modes

from fastvq.kernels.taps import Taps, read_taps
from fastvq.ops.causal_conv.options import GradientOptions, Gradients, Options
from fastvq.ops.causal_conv.reference import activate

# Elements from which a transposed copy is worth a call of its own.
_IMAGE = 4096
# Elements up to which gathering them is quicker than two convolutions, with one thread or two.
_GATHERED = 1 << 17
_GATHERED_DTYPES = (torch.float32, torch.float64)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor | None]:
    """Output, and with ``gate`` and ``keep`` what the gate is applied to, [B, O, H, W]."""
    taps = read_taps(weight.shape[-1], options.mask, options.form)
    out = _convolve(activate(x, options.activation), weight, bias, taps)
    if context is not None:
        out += context
    pre_gate = out
    if options.gate:
        out = F.glu(pre_gate, dim=1)
    if residual is not None:
        out = out.add_(residual) if residual.dtype == out.dtype else out + residual
    return channels_last(out), channels_last(pre_gate) if options.gate and options.keep else None


def backward(grad: Tensor, x: Tensor, weight: Tensor, pre_gate: Tensor | None, options: GradientOptions) -> Gradients:
    """Gradients of x, weight and bias, from that of the convolution's result; an empty tensor for what is not needed.

    With ``pre_gate``, [B, O, H, W], from the gradient of the gate's result, [B, O / 2, H, W], and that of the
    convolution's result in addition.
    """
    of_result = grad.new_empty(0)
    if pre_gate is not None:
        grad = of_result = channels_last(torch.ops.aten.glu_backward(channels_last(grad), pre_gate, 1))
    if not (options.needs_input or options.needs_weight):
        return grad.new_empty(0), grad.new_empty(0), grad.new_empty(0), of_result
    activated = activate(x, options.activation)
    taps = read_taps(weight.shape[-1], options.mask, options.form)
    of_x, of_weight, of_bias = _gradients(grad, activated, weight, taps, options.needs_input, options.needs_weight)
    if options.needs_input and options.activation is not None:
        of_x = _through_activation(of_x, activated, options.activation)
    return channels_last(of_x) if options.needs_input else of_x, of_weight, of_bias, of_result


def empty_image(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the same batch and grid, channels-last; of the same type unless told otherwise."""
    batch, _, height, width = like.shape
    strides = height * width * channels, 1, width * channels, channels
    return like.new_empty_strided((batch, channels, height, width), strides, dtype=dtype)


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
    kernel, above, left, count = taps
    current = taps.current
    if kernel == 1 and current and x.numel():
        return F.conv2d(x, weight, bias)
    # Rows of the kernel that are above the whole grid are left out.
    first, last = kernel * max(0, above + 1 - height), count
    size = batch * height * width * channels * (last - first)
    if x.is_cpu and x.dtype in _GATHERED_DTYPES and 0 < size <= _GATHERED:
        # One row for each position, and one of zeros for what lies outside the grid.
        rows = F.pad(x.permute(0, 2, 3, 1).view(batch, height * width, channels), (0, 0, 0, 1))
        read = rows.index_select(1, _sources(height, width, taps)).view(batch, height, width, -1)
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
def _sources(height: int, width: int, taps: Taps) -> Tensor:
    """[H * W * T]: which position each tap of each position reads, H * W outside the grid.

    Of the taps those above the whole grid are left out.
    """
    # A tensor of inference mode, or one without values, could not be used outside it later.
    with torch.inference_mode(False), _disable_current_modes():
        kernel = taps.kernel
        tap = torch.arange(kernel * max(0, taps.above + 1 - height), taps.count, device="cpu")
        row = torch.arange(height, device="cpu")[:, None, None] + tap // kernel - taps.above
        column = torch.arange(width, device="cpu")[:, None] + tap % kernel - taps.left
        inside = (row >= 0) & (column >= 0) & (column < width)
        return torch.where(inside, row * width + column, height * width).flatten()


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, taps: Taps, needs_input: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_convolve` with respect to x, weight and bias."""
    if _in_float32(x):
        wide = _gradients(grad.float(), x.float(), weight.float(), taps, needs_input, needs_weight)
        return wide[0].to(x.dtype), wide[1].to(x.dtype), wide[2].to(x.dtype)
    x, grad = channels_last(x), channels_last(grad)
    kernel, above, left, _ = taps
    current = taps.current
    of_x, of_weight = grad.new_empty(0), grad.new_empty(0)
    if needs_weight:
        of_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if x.numel() and current:
        given = _padded(x, left, current - left - 1, 0, 0)
        part = weight[:, :, above : above + 1, :current]
        found, of_part = library_gradients(grad, given, part, (0, 0), needs_input, needs_weight)
        if found is not None:
            of_x = _padded(found[..., left:], 0, 1 + left - current, 0, 0)
        if of_part is not None:
            of_weight[:, :, above : above + 1, :current] = of_part
    elif needs_input:
        of_x = torch.zeros_like(x)
    if x.numel() and above and x.shape[2] > 1:
        # An even kernel makes one column more, which nothing depends on.
        below = _padded(grad[:, :, 1:], 0, 2 * left + 1 - kernel, 0, 0)
        given, part = _padded(x, 0, 0, above - 1, -1), weight[:, :, :above]
        found, of_part = library_gradients(below, given, part, (0, left), needs_input, needs_weight)
        if found is not None:
            of_x[:, :, :-1] += found[:, :, above - 1 :]
        if of_part is not None:
            of_weight[:, :, :above] = of_part
    return of_x, of_weight, grad.sum((0, 2, 3)) if needs_weight else grad.new_empty(0)


def _in_float32(x: Tensor) -> bool:
    """On CPUs products of float16 take several times as long, and two roundings lose more than one."""
    return x.dtype == torch.float16 and x.device.type == "cpu"


def library_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], needs_input: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight by PyTorch's operator, None where not needed."""
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
