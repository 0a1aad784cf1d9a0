"""Who multiplies windows of the rows above with weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.causal import Forms
from bench.product import ROWS, TAPS, RowProduct
from bench.registry import LeftOutError, peer
from fastvq import _engine


@peer("row product", name="fastvq")
def ours(problem: RowProduct) -> Forms:
    if not _engine.available():
        raise LeftOutError(str(_engine.why_unavailable()))
    from fastvq._product import Product

    case, product = problem.case, Product([problem.weight])
    return Forms(problem, [lambda: product([problem.x], torch.empty(case.batch, case.width, case.columns))])


@peer("row product", name="conv2d")
def library(problem: RowProduct) -> Forms:
    x, weight = problem.x.permute(0, 3, 1, 2), problem.weight.permute(3, 2, 0, 1)
    plain_x, plain = x.contiguous(), weight.contiguous()
    last = weight.contiguous(memory_format=torch.channels_last)
    forms: list[Callable[[], Tensor]] = [lambda: F.conv2d(x, last), lambda: F.conv2d(plain_x, plain)]
    if (prepacked := _prepacked(x, plain)) is not None:
        forms.insert(0, prepacked)
    return Forms(problem, [_inference(form) for form in forms])


def _inference(form: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return form()[:, :, 0].transpose(1, 2)

    return run


def _prepacked(x: Tensor, weight: Tensor) -> Callable[[], Tensor] | None:
    """With weights in the library's own order, as compiled models have them."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return None
    zero, one = [0, 0], [1, 1]
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
    packed = reorder(weight.to_mkldnn(), zero, one, one, 1, list(x.shape))  # type: ignore[call-arg]
    convolve = torch.ops.mkldnn._convolution_pointwise
    return lambda: convolve(x, packed, None, zero, one, one, 1, "none", [], "")


@peer("row product", name="mm only")
class Multiplied(Forms):
    """The library's product of the same size, of windows that are copied beforehand."""

    whole = False

    def __init__(self, problem: RowProduct) -> None:
        case, depth = problem.case, ROWS * TAPS * problem.case.channels
        windows, weight = torch.randn(case.batch * case.width, depth), problem.weight.reshape(depth, case.columns)
        super().__init__(problem, [lambda: torch.mm(windows, weight)])
