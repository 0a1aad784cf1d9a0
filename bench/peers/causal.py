"""Who computes causal convolutions, gated blocks, attention and whole priors in the benchmark."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import CausalCase, PriorCase
from bench.causal import (
    Attention,
    Block,
    Convolution,
    Forms,
    MaskedConv2d,
    PlainConv2d,
    Run,
    WholePrior,
    mask_convolutions,
    masked_conv2d,
)
from bench.registry import LeftOutError, Problem, peer
from fastvq.models import Prior
from fastvq.ops import causal_attention, causal_conv2d


def _needs_compiler(problem: Problem) -> None:
    # Compiling takes longer than all runs of a case.
    if not problem.tuned:
        raise LeftOutError("nothing is compiled in a run that only checks results")


def _conv(problem: Convolution, forward: Callable[..., Tensor], x: Tensor) -> Run:
    upstream = problem.upstream if x is problem.x else problem.upstream.contiguous()
    return problem.run(forward, (x, problem.weight, problem.bias), upstream)


def _ways(problem: Convolution) -> list[Callable[..., Tensor]]:
    case = problem.case

    def way(x: Tensor, weight: Tensor, bias: Tensor, *, by_copy: bool) -> Tensor:
        return masked_conv2d(x, weight, bias, problem.read, case.form, by_copy=by_copy)

    return [functools.partial(way, by_copy=copied) for copied in ((False, True) if case.form == "rows" else (False,))]


@peer("causal conv", name="fastvq")
def conv(problem: Convolution) -> Forms:
    case = problem.case

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv2d(x, weight, bias, mask=case.mask, form=case.form)

    return Forms(problem, [_conv(problem, ours, problem.x)])


@peer("causal conv", name="eager masked")
def masked_conv(problem: Convolution) -> Forms:
    plain = problem.x.contiguous(memory_format=torch.contiguous_format)
    return Forms(problem, [_conv(problem, way, x) for x in (problem.x, plain) for way in _ways(problem)])


def _pays(case: CausalCase) -> bool:
    """Compiling gains next to nothing on a forward pass alone."""
    return case.mask == "strict" and case.what != "forward"


@peer("causal conv", name="compiled masked", optional=True, takes=_pays)
def compiled_conv(problem: Convolution) -> Forms:
    _needs_compiler(problem)
    return Forms(problem, [_conv(problem, torch.compile(way), problem.x) for way in _ways(problem)])


def _block(problem: Block, block: nn.Module, *, compiled: bool = False) -> Forms:
    function = torch.compile(block) if compiled else block
    tensors = (problem.x, problem.context, *block.parameters())
    return Forms(problem, [problem.run(lambda x, context, *_: function(x, context), tensors, problem.upstream)])


@peer("gated block", name="fastvq")
def block(problem: Block) -> Forms:
    return _block(problem, problem.block)


@peer("gated block", name="eager masked")
def masked_block(problem: Block) -> Forms:
    return _block(problem, problem.masked)


@peer("gated block", name="compiled masked", optional=True)
def compiled_block(problem: Block) -> Forms:
    _needs_compiler(problem)
    return _block(problem, problem.masked, compiled=True)


def _attention(problem: Attention, forward: Callable[..., Tensor]) -> Forms:
    return Forms(problem, [problem.run(forward, (problem.query, problem.key, problem.value), problem.upstream)])


@peer("causal attention", name="fastvq")
def attention(problem: Attention) -> Forms:
    return _attention(problem, functools.partial(causal_attention, mask=problem.case.mask))


@peer("causal attention", name="SDPA with a mask", optional=True)
def sdpa(problem: Attention) -> Forms:
    strict, length = problem.case.mask == "strict", problem.case.positions
    visible = torch.ones(length, length, dtype=torch.bool, device=problem.case.device).tril(-1 if strict else 0)

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not strict:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        # A row without any key would be NaN in some versions.
        rest = F.scaled_dot_product_attention(query[:, :, 1:], key, value, attn_mask=visible[1:])
        return F.pad(rest, (0, 0, 1, 0))

    return _attention(problem, explicit)


@peer("causal attention", name="SDPA shifted", optional=True)
def shifted_sdpa(problem: Attention) -> Forms:
    """Keys shifted by one make the strict mask the usual causal one, which flash kernels know."""
    strict = problem.case.mask == "strict"

    def shifted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not strict:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        rest = F.scaled_dot_product_attention(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], is_causal=True)
        return F.pad(rest, (0, 0, 1, 0))

    return _attention(problem, shifted)


@peer("causal attention", name="FlexAttention", optional=True)
def flex(problem: Attention) -> Forms:
    _needs_compiler(problem)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    strict, length, device = problem.case.mask == "strict", problem.case.positions, problem.case.device

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query > key if strict else query >= key

    blocks = create_block_mask(visible, None, None, length, length, device=device)
    return _attention(problem, functools.partial(torch.compile(flex_attention), block_mask=blocks))


@peer("causal prior", name="fastvq")
def whole_prior(problem: WholePrior) -> Forms:
    return Forms(problem, [problem.losses(problem.prior)])


def _masked(problem: WholePrior) -> Prior:
    """The same prior, step by step with masked convolutions."""
    masked = mask_convolutions(copy.deepcopy(problem.prior))
    if not any(isinstance(module, (MaskedConv2d, PlainConv2d)) for module in masked.modules()):
        raise LeftOutError("the prior has no causal convolutions")
    assert isinstance(masked, Prior)
    return masked


@peer("causal prior", name="masked convolutions")
def masked_prior(problem: WholePrior) -> Forms:
    return Forms(problem, [problem.losses(_masked(problem))])


def _trained_on_gpu(case: PriorCase) -> bool:
    return case.device == "cuda" and case.what == "training"


@peer("causal prior", name="compiled masked", optional=True, takes=_trained_on_gpu)
def compiled_prior(problem: WholePrior) -> Forms:
    _needs_compiler(problem)
    masked = _masked(problem)
    return Forms(problem, [problem.losses(masked, torch.compile(masked.nll))])


@peer("causal prior", name="fastvq compiled", optional=True, takes=_trained_on_gpu)
def compiled_whole_prior(problem: WholePrior) -> Forms:
    """What a user gets who compiles our prior."""
    _needs_compiler(problem)
    return Forms(problem, [problem.losses(problem.prior, torch.compile(problem.prior.nll))])
