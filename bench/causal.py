"""What those who compute causal convolutions, gated blocks, attention and whole priors share, and how they are checked.

Every peer multiplies what the mask hides as well, but in the library's best form: convolutions in the quicker memory
layout and way of padding, tried beforehand.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import registry
from bench.cases import CausalCase, PriorCase
from bench.harness import Check, Peer, Result, Work, timed
from bench.machine import CPU_FLOAT32
from fastvq.kernels.taps import read_taps
from fastvq.models import Prior, build
from fastvq.models.blocks import CausalConv2d, GatedBlock
from fastvq.ops.grid import Form, Mask

Run = Callable[[], list[Tensor]]
# By name: how to find it among outputs, and its value in float64.
Exact = dict[str, tuple[Callable[[list[Tensor]], Tensor], Tensor]]
# Largest error relative to the largest magnitude: rounding of float32 and of bfloat16 is below, a lost tap far above.
ERROR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
_CHECKED_CHANNELS = 8


class Forms(registry.Contender):
    """The quickest of some ways to compute the same."""

    def __init__(self, problem: registry.Problem, forms: Sequence[Callable[[], Any]]) -> None:
        super().__init__()
        self.problem, self.forms = problem, forms

    def warm(self) -> list[Peer]:
        device, times = self.problem.case.device, []
        for form in self.forms if self.problem.tuned else self.forms[:1]:
            form()
            times.append(min(timed(form, device=device) for _ in range(2)) if self.problem.tuned else 0.0)
        run = self.forms[times.index(min(times))]
        return [Peer(self.name, run, min(times), self.problem.threads, device=device)]


class _Problem(registry.Problem):
    """``backward``: the work of forward and backward together, as a multiple of the forward pass."""

    backward = 3.0

    def describe(self, flops: float) -> None:
        """Note the work, from the operations of the forward pass over what the mask leaves."""
        case = self.case
        flops *= 1.0 if case.what == "forward" else self.backward
        unit = CPU_FLOAT32 if case.device == "cpu" else "cuda bfloat16"
        self.work = [Work("what the mask leaves", flops, unit=unit)]

    def measure_ceilings(self) -> None:
        if self.case.device == "cpu":
            self.ceilings.measure_gemm()
        else:
            self.ceilings.measure_gpu("cuda bfloat16", 8192, 8192, 8192)


class CausalProblem(_Problem):
    """A case's tensors, in float32 on a CPU and bfloat16 on a GPU."""

    case: CausalCase

    def __init__(self, case: CausalCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        self.facts = {"what": case.what, "channels": case.channels, "shape": list(case.shape), "device": case.device}
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

    @abstractmethod
    def exact(self) -> Exact:
        """What every peer should find."""

    @functools.cached_property
    def _exact(self) -> Exact:
        return self.exact()

    def check(self, contender: registry.Contender | None, output: list[Tensor]) -> Check:
        errors = {}
        for name, (pick, want) in self._exact.items():
            errors[name] = float((pick(output).double() - want).abs().max() / want.abs().max())
        worst = max(errors.values())
        return Check(worst <= ERROR[self.dtype], f"relative error {worst:.1e}", {"errors": errors})


def read_mask(kernel_size: int, mask: Mask, form: Form) -> Tensor:
    """[k, k]: 1 for the taps that are read."""
    read = torch.zeros(kernel_size, kernel_size)
    read.view(-1)[: read_taps(kernel_size, mask, form).count] = 1
    return read


def masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, read: Tensor, form: Form, *, by_copy: bool) -> Tensor:
    """What is common: a dense convolution with a masked kernel. ``by_copy``: pads rows above by a copy of x."""
    reach = weight.shape[-1] // 2
    if form == "symmetric":
        return F.conv2d(x, weight * read, bias, padding=reach)
    if by_copy:
        return F.conv2d(F.pad(x, (reach, reach, 2 * reach, 0)), weight * read, bias)
    return F.conv2d(x, weight * read, bias, padding=(2 * reach, reach))[:, :, : x.shape[2]]


@registry.problem("causal conv")
class Convolution(CausalProblem):
    legend = (
        "causal conv: the floor counts the taps that the mask leaves. Every peer multiplies the masked ones too, in",
        "the quicker memory layout and way of padding.",
    )

    def __init__(self, case: CausalCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        c, k = case.channels, case.kernel_size
        self.read = read_mask(k, case.mask, case.form).to(case.device, self.dtype)
        self.x, self.upstream = self.image(c), self.image(c)
        self.weight, self.bias = self.normal(c, c, k, k) / c**0.5, self.normal(c)
        self.describe(2.0 * case.batch * case.positions * c * c * float(self.read.float().sum()))

    def exact(self) -> Exact:
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


@registry.problem("gated block")
class Block(CausalProblem):
    """The gated residual block of a prior, with features of a condition."""

    legend = ("gated block: two causal convolutions and what lies around them, in a residual layer.",)

    def __init__(self, case: CausalCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        c = case.channels

        def causal(in_channels: int, out_channels: int) -> CausalConv2d:
            return CausalConv2d(in_channels, out_channels, case.kernel_size, mask=case.mask, form=case.form)

        def block() -> GatedBlock:
            torch.manual_seed(0)
            return GatedBlock(c, c, conv=causal, context_channels=c).to(case.device, self.dtype)

        self.block, self.masked = block(), mask_convolutions(block())
        self.x, self.context, self.upstream = self.image(c), self.image(c), self.image(c)
        taps = float(read_mask(case.kernel_size, case.mask, case.form).sum())
        self.describe(2.0 * case.batch * case.positions * c * c * (3 * taps + 2))

    def exact(self) -> Exact:
        block = mask_convolutions(copy.deepcopy(self.block).double())
        x, context = self.x[:1].detach().double().requires_grad_(), self.context[:1].detach().double()
        out = block(x, context)
        found = {"out": (lambda o: o[0][:1], out.detach())}
        if self.case.what != "forward":
            (of_x,) = torch.autograd.grad(out, x, self.upstream[:1].double())
            found["x"] = (lambda o: o[1][:1], of_x)
        return found


@registry.problem("causal attention")
class Attention(CausalProblem):
    legend = ("causal attention: the floor is half of the two full products.",)
    # Two products forward, and backward five: that of the logits is done once more.
    backward = 3.5

    def __init__(self, case: CausalCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        # [B, heads, N, D] as a view of channels-last features.
        width = case.channels // case.heads
        shape = (case.batch, case.positions, case.heads, width)
        self.query, self.key, self.value, self.upstream = (self.normal(*shape).transpose(1, 2) for _ in range(4))
        pairs = case.positions * (case.positions + (1 if case.mask == "inclusive" else -1)) // 2
        self.describe(4.0 * case.batch * pairs * case.channels)

    def exact(self) -> Exact:
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


@registry.problem("causal prior")
class WholePrior(_Problem):
    """A training step, or scoring, of a prior; the peers are made of it by changing its modules."""

    legend = ("causal prior: the peer is the same prior with masked convolutions in place of causal ones.",)
    case: PriorCase

    def __init__(self, case: PriorCase, **rest: Any) -> None:
        super().__init__(case, **rest)
        self.facts = {"what": case.what, "device": case.device}
        self.inputs = _prior_inputs(case)
        self.prior = _prior(case)
        with FlopCounterMode(display=False) as counter:
            self._exact = self.losses(self.prior)()
        # What is counted is forward and backward where both are done.
        unit = CPU_FLOAT32 if case.device == "cpu" else "cuda bfloat16"
        self.work = [Work("what the masks leave", float(counter.get_total_flops()), unit=unit)]

    def check(self, contender: registry.Contender, output: list[Tensor]) -> Check:
        errors = [
            float((mine.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-6))
            for mine, right in zip(output, self._exact, strict=True)
        ]
        limit = 1e-3 if self.case.device == "cpu" else 0.1
        return Check(max(errors) <= limit, f"within {max(errors):.1e} of each other", {"errors": errors})

    def finish(self, result: Result, others: Sequence[Result]) -> None:
        config = self.case.config
        assert config is not None
        codes = self.case.batch * config.shape[0] * config.shape[1]
        for entry in result.entries:
            entry.facts["codes_per_second"] = codes / entry.median
            entry.remarks = [f"{codes / entry.median:.3g} codes/s"]

    def losses(self, prior: Prior, score: Callable[..., Tensor] | None = None) -> Run:
        """``score``: in place of the prior's own negative log-likelihoods."""
        case, inputs, score = self.case, self.inputs, score or prior.nll

        def nll() -> Tensor:
            with torch.autocast(case.device, torch.bfloat16, enabled=case.device == "cuda"):
                return score(*inputs)

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
