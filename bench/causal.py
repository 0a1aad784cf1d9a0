"""How causal convolution, attention, gated blocks and whole priors are timed and checked.

Every peer multiplies what the mask hides as well, but in the library's best form: convolutions in the quicker memory
layout and way of padding, tried beforehand.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.causal_cases import CausalCase, PriorCase
from bench.harness import Check, Entry, Peer, Recorder, Result, Work, measure, timed
from bench.machine import CPU_FLOAT32
from fastvq.kernels.taps import read_taps
from fastvq.models import Prior, build
from fastvq.models.blocks import CausalConv2d, GatedBlock
from fastvq.ops import causal_attention, causal_conv2d
from fastvq.ops.grid import Form, Mask

Run = Callable[[], list[Tensor]]
# Largest error relative to the largest magnitude: rounding of float32 and of bfloat16 is below, a lost tap far above.
ERROR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_CHECKED_CHANNELS = 8


def run_case(case: CausalCase, recorder: Recorder) -> Result:
    """Time everyone on a convolution, a block or attention, and check what each has found in the same run."""
    problem = {"causal conv": Convolution, "gated block": Block, "causal attention": Attention}[case.operation](case)
    flops = problem.flops * (1.0 if case.what == "forward" else problem.backward)
    result = Result(
        case.operation, case.name, case.batch, [], work=[Work("what the mask leaves", flops, unit=_unit(case))]
    )
    result.facts = {"what": case.what, "channels": case.channels, "shape": list(case.shape), "device": case.device}
    runs: dict[str, Run] = {}
    for name, forms in problem.contenders(tuned=not recorder.quick).items():
        try:
            runs[name] = _quickest(forms, case, tuned=not recorder.quick)
        except Exception as error:
            # A compiler may be missing, or an operator not exist for this device.
            if name == "fastvq" or name.startswith("eager"):
                raise
            lines = str(error).strip().splitlines()
            result.left_out[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]
    _time(result, runs, case.device, recorder, problem.check)
    return result


def _quickest(forms: Sequence[Run], case: CausalCase, *, tuned: bool) -> Run:
    if not tuned:
        forms[0]()
        return forms[0]
    times = []
    for form in forms:
        form()
        times.append(min(timed(form, device=case.device) for _ in range(2)))
    return forms[times.index(min(times))]


def _time(
    result: Result, runs: dict[str, Run], device: str, recorder: Recorder, check: Callable[[list[Tensor]], Check]
) -> None:
    threads = torch.get_num_threads()
    peers = []
    for name, run in runs.items():
        expected = 0.0 if recorder.quick else timed(run, device=device)
        peers.append(Peer(name, run, expected, threads, device=device))
    seconds, found = measure(peers, quick=recorder.quick)
    for name in runs:
        outputs = found.pop(name)
        assert isinstance(outputs, list)
        entry = Entry(name, seconds[name], check(outputs), facts={"threads": threads})
        result.entries.append(entry)
        assert entry.check is not None
        recorder.log(f"  {name}: {entry.median:.3g} s x {len(entry.seconds)}; {entry.check.summary}")


def _unit(case: CausalCase | PriorCase) -> str:
    return CPU_FLOAT32 if case.device == "cpu" else "cuda bfloat16"


class _Problem:
    """A case's tensors, in float32 on a CPU and bfloat16 on a GPU.

    Attributes:
        flops: of the forward pass over what the mask leaves.
        backward: forward and backward together, as a multiple of the forward pass.
    """

    flops = 0.0
    backward = 3.0

    def __init__(self, case: CausalCase) -> None:
        self.case = case
        self.dtype = torch.float32 if case.device == "cpu" else torch.bfloat16
        self.generator = torch.Generator(case.device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.case.device).to(self.dtype)

    def image(self, channels: int) -> Tensor:
        """Channels-last, as features of a prior are."""
        shape = (self.case.batch, channels, *self.case.shape)
        return self.normal(*shape).contiguous(memory_format=torch.channels_last)

    def run(self, forward: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Run:
        """The output, and with the backward pass the gradients of all inputs."""

        def both() -> list[Tensor]:
            out = forward(*inputs)
            return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

        @torch.no_grad()
        def alone() -> list[Tensor]:
            # FlexAttention refuses inputs that need a gradient, even where none is recorded.
            return [forward(*(tensor.detach() for tensor in inputs))]

        leaves = [tensor.requires_grad_() for tensor in inputs]
        return alone if self.case.what == "forward" else both

    def contenders(self, *, tuned: bool) -> dict[str, list[Run]]:
        raise NotImplementedError

    def exact(self) -> dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]:
        """By name: how to find it among outputs, and its value in float64."""
        raise NotImplementedError

    @functools.cached_property
    def _exact(self) -> dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]:
        return self.exact()

    def check(self, outputs: list[Tensor]) -> Check:
        errors = {}
        for name, (pick, want) in self._exact.items():
            errors[name] = float((pick(outputs).double() - want).abs().max() / want.abs().max())
        worst = max(errors.values())
        return Check(worst <= ERROR[self.dtype], f"relative error {worst:.1e}", {"errors": errors})


def read_mask(kernel_size: int, mask: Mask, form: Form) -> Tensor:
    """[k, k]: 1 for the taps that are read."""
    above, _, current = read_taps(kernel_size, mask, form)
    read = torch.zeros(kernel_size, kernel_size)
    read.view(-1)[: above * kernel_size + current] = 1
    return read


def masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, read: Tensor, form: Form, *, by_copy: bool) -> Tensor:
    """What is common: a dense convolution with a masked kernel. ``by_copy``: pads rows above by a copy of x."""
    reach = weight.shape[-1] // 2
    if form == "symmetric":
        return F.conv2d(x, weight * read, bias, padding=reach)
    if by_copy:
        return F.conv2d(F.pad(x, (reach, reach, 2 * reach, 0)), weight * read, bias)
    return F.conv2d(x, weight * read, bias, padding=(2 * reach, reach))[:, :, : x.shape[2]]


class Convolution(_Problem):
    def __init__(self, case: CausalCase) -> None:
        super().__init__(case)
        c, k = case.channels, case.kernel_size
        self.read = read_mask(k, case.mask, case.form).to(case.device, self.dtype)
        self.x, self.upstream = self.image(c), self.image(c)
        self.weight, self.bias = self.normal(c, c, k, k) / c**0.5, self.normal(c)
        self.flops = 2.0 * case.batch * case.positions * c * c * float(self.read.float().sum())

    def contenders(self, *, tuned: bool) -> dict[str, list[Run]]:
        case = self.case
        plain = self.x.contiguous(memory_format=torch.contiguous_format)

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv2d(x, weight, bias, mask=case.mask, form=case.form)

        def masked(by_copy: bool) -> Callable[..., Tensor]:
            return lambda x, weight, bias: masked_conv2d(x, weight, bias, self.read, case.form, by_copy=by_copy)

        def run(forward: Callable[..., Tensor], x: Tensor) -> Run:
            upstream = self.upstream if x is self.x else self.upstream.contiguous()
            return self.run(forward, (x, self.weight, self.bias), upstream)

        ways = [masked(by_copy) for by_copy in ((False, True) if case.form == "rows" else (False,))]
        found = {
            "fastvq": [run(ours, self.x)],
            "eager masked": [run(way, x) for x in (self.x, plain) for way in ways],
        }
        # Compiling takes longer than all runs of a case, and gains next to nothing on a forward pass alone.
        if tuned and case.mask == "strict" and case.what != "forward":
            found["compiled masked"] = [run(torch.compile(way), self.x) for way in ways]
        return found

    def exact(self) -> dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]:
        few = _CHECKED_CHANNELS
        x, weight, bias = (t.detach().double() for t in (self.x, self.weight, self.bias))
        read, upstream = self.read.double(), self.upstream.double()
        some = weight[:few].requires_grad_()
        out = masked_conv2d(x, some, bias[:few], read, self.case.form, by_copy=True)
        found = {"out": (lambda o: o[0][:, :few], out.detach())}
        if self.case.what != "forward":
            (of_weight,) = torch.autograd.grad(out, some, upstream[:, :few])
            first = x[:1].requires_grad_()
            (of_x,) = torch.autograd.grad(
                masked_conv2d(first, weight, bias, read, self.case.form, by_copy=True), first, upstream[:1]
            )
            found |= {"x": (lambda o: o[1][:1], of_x), "weight": (lambda o: o[2][:few], of_weight)}
        return found


class MaskedConv2d(nn.Module):
    """A dense convolution with a masked kernel in place of `CausalConv2d`, of the same parameters."""

    def __init__(self, conv: CausalConv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.form = conv.weight, conv.bias, conv.form
        read = read_mask(conv.weight.shape[-1], conv.mask, conv.form)
        self.register_buffer("read", read.to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return masked_conv2d(x, self.weight, self.bias, self.read, self.form, by_copy=True)


class PlainConv2d(nn.Module):
    """A 1 x 1 convolution by itself, so that a block around it computes one step after the other."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def mask_convolutions(module: nn.Module) -> nn.Module:
    """Replaces causal convolutions by masked ones, and the fused forms of blocks by their steps; in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CausalConv2d):
                setattr(parent, name, MaskedConv2d(child))
            elif isinstance(parent, GatedBlock) and isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                setattr(parent, name, PlainConv2d(child))
    return module


class Block(_Problem):
    """The gated residual block of a prior, with features of a condition."""

    def __init__(self, case: CausalCase) -> None:
        super().__init__(case)
        c = case.channels

        def causal(in_channels: int, out_channels: int) -> CausalConv2d:
            return CausalConv2d(in_channels, out_channels, case.kernel_size, mask=case.mask, form=case.form)

        def block() -> GatedBlock:
            torch.manual_seed(0)
            return GatedBlock(c, c, conv=causal, context_channels=c).to(case.device, self.dtype)

        self.block, self.masked = block(), mask_convolutions(block())
        self.x, self.context, self.upstream = self.image(c), self.image(c), self.image(c)
        taps = float(read_mask(case.kernel_size, case.mask, case.form).sum())
        self.flops = 2.0 * case.batch * case.positions * c * c * (3 * taps + 2)

    def contenders(self, *, tuned: bool) -> dict[str, list[Run]]:
        def run(block: Callable[..., Tensor], parameters: Sequence[Tensor]) -> Run:
            return self.run(
                lambda x, context, *_: block(x, context), (self.x, self.context, *parameters), self.upstream
            )

        ours, theirs = list(self.block.parameters()), list(self.masked.parameters())
        found = {"fastvq": [run(self.block, ours)], "eager masked": [run(self.masked, theirs)]}
        if tuned:
            found["compiled masked"] = [run(torch.compile(self.masked), theirs)]
        return found

    def exact(self) -> dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]:
        block = mask_convolutions(copy.deepcopy(self.block).double())
        x, context = self.x[:1].detach().double().requires_grad_(), self.context[:1].detach().double()
        out = block(x, context)
        found = {"out": (lambda o: o[0][:1], out.detach())}
        if self.case.what != "forward":
            (of_x,) = torch.autograd.grad(out, x, self.upstream[:1].double())
            found["x"] = (lambda o: o[1][:1], of_x)
        return found


class Attention(_Problem):
    # Two products forward, and backward five: that of the logits is done once more.
    backward = 3.5

    def __init__(self, case: CausalCase) -> None:
        super().__init__(case)
        # [B, heads, N, D] as a view of channels-last features.
        width = case.channels // case.heads
        shape = (case.batch, case.positions, case.heads, width)
        self.query, self.key, self.value, self.upstream = (self.normal(*shape).transpose(1, 2) for _ in range(4))
        pairs = case.positions * (case.positions + (1 if case.mask == "inclusive" else -1)) // 2
        self.flops = 4.0 * case.batch * pairs * case.channels

    def contenders(self, *, tuned: bool) -> dict[str, list[Run]]:
        case, length = self.case, self.case.positions
        strict = case.mask == "strict"
        visible = torch.ones(length, length, dtype=torch.bool, device=case.device).tril(-1 if strict else 0)

        def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return causal_attention(query, key, value, mask=case.mask)

        def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if not strict:
                return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
            # A row without any key would be NaN in some versions.
            rest = F.scaled_dot_product_attention(query[:, :, 1:], key, value, attn_mask=visible[1:])
            return F.pad(rest, (0, 0, 1, 0))

        def run(forward: Callable[..., Tensor]) -> Run:
            return self.run(forward, (self.query, self.key, self.value), self.upstream)

        found = {"fastvq": [run(ours)], "SDPA with a mask": [run(explicit)]}
        if tuned:
            found["FlexAttention"] = [run(self._flex())]
        return found

    def _flex(self) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        strict, length, device = self.case.mask == "strict", self.case.positions, self.case.device

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query > key if strict else query >= key

        blocks = create_block_mask(visible, None, None, length, length, device=device)
        compiled = torch.compile(flex_attention)
        return lambda query, key, value: compiled(query, key, value, block_mask=blocks)

    def exact(self) -> dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]:
        query, key, value = (t[:1, :1].detach().double().requires_grad_() for t in (self.query, self.key, self.value))
        logits = query @ key.mT * query.shape[-1] ** -0.5
        hidden = torch.ones_like(logits, dtype=torch.bool).triu(0 if self.case.mask == "strict" else 1)
        weights = logits.masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0)
        out = weights @ value
        found = {"out": (lambda o: o[0][:1, :1], out.detach())}
        if self.case.what != "forward":
            grads = torch.autograd.grad(out, (query, key, value), self.upstream[:1, :1].double())
            found |= {
                name: (lambda o, i=i: o[i][:1, :1], grad)
                for i, (name, grad) in enumerate(zip(("query", "key", "value"), grads, strict=True), 1)
            }
        return found


# --- whole priors -------------------------------------------------------------------------------------------------


def run_prior_case(case: PriorCase, recorder: Recorder) -> Result:
    """Time a training step, or scoring, of a prior and of the same prior with masked convolutions, step by step."""
    assert case.config is not None
    ours, theirs = _prior(case), mask_convolutions(_prior(case))
    inputs = _prior_inputs(case)
    with FlopCounterMode(display=False) as counter:
        exact = _losses(case, ours, inputs)()
    work = Work("what the masks leave", float(counter.get_total_flops()), unit=_unit(case))
    result = Result(case.operation, case.name, case.batch, [], work=[work])
    result.facts = {"what": case.what, "device": case.device}
    runs = {"fastvq": _losses(case, ours, inputs)}
    if any(isinstance(m, (MaskedConv2d, PlainConv2d)) for m in theirs.modules()):
        runs["masked convolutions"] = _losses(case, theirs, inputs)

    def check(outputs: list[Tensor]) -> Check:
        errors = [
            float((mine.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-6))
            for mine, right in zip(outputs, exact, strict=True)
        ]
        limit = 1e-3 if case.device == "cpu" else 0.1
        return Check(max(errors) <= limit, f"within {max(errors):.1e} of each other", {"errors": errors})

    _time(result, runs, case.device, recorder, check)
    codes = case.batch * case.config.shape[0] * case.config.shape[1]
    for entry in result.entries:
        entry.facts["codes_per_second"] = codes / entry.median
        entry.remarks = [f"{codes / entry.median:.3g} codes/s"]
    return result


def _prior(case: PriorCase) -> Prior:
    torch.manual_seed(0)
    prior = build(case.config)
    assert isinstance(prior, Prior)
    # Without dropout both compute the same: it draws in the order of memory, which differs.
    for module in prior.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return prior.to(case.device).train(case.what == "training")


def _prior_inputs(case: PriorCase) -> tuple[Any, ...]:
    config = case.config
    assert config is not None
    generator = torch.Generator().manual_seed(1)

    def codes(count: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(count, (case.batch, *shape), generator=generator).to(case.device)

    grids = zip(config.condition_num_codes, config.condition_shapes, strict=True)
    condition = [codes(count, shape) for count, shape in grids] or None
    label = None if config.num_classes is None else (torch.arange(case.batch) % config.num_classes).to(case.device)
    return codes(config.num_codes, config.shape), condition, label


def _losses(case: PriorCase, prior: Prior, inputs: tuple[Any, ...]) -> Run:
    def nll() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.device == "cuda"):
            return prior.nll(*inputs)

    def training() -> list[Tensor]:
        prior.zero_grad(set_to_none=True)
        loss = nll().mean()
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in prior.parameters() if p.grad is not None])
        return [loss.detach(), norms.norm()]

    @torch.no_grad()
    def scoring() -> list[Tensor]:
        return [nll()]

    return training if case.what == "training" else scoring
