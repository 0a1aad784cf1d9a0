"""The library's convolution between Triton kernels, against loops in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from causal_conv_cases import Case, activate, by_loop, by_torch, close, normal, read_taps, surround
from helpers import refuses
from torch import Tensor
from triton_helpers import Check, checked_in_both, serve

from fastvq._precision import full_float32
from fastvq.errors import ArgumentError, UnavailableError
from fastvq.ops import fused_causal_conv2d, fused_causal_conv2d_reference
from fastvq.ops.causal_conv import backends, gated_block
from fastvq.ops.causal_conv.block import Step
from fastvq.ops.causal_conv.options import Options


def run(case: Case, made: dict[str, Tensor], grad: Tensor, backend: str = "fused") -> list[Tensor]:
    """The output and the gradients of all tensors."""
    leaves = {name: value.detach().requires_grad_() for name, value in made.items()}
    how = {"mask": case.mask, "form": case.form, "activation": case.activation, "gate": case.gate}
    with full_float32(grad.device):
        out = fused_causal_conv2d(**leaves, **how, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)]


def agrees(case: Case, device: str) -> None:
    """Output and all gradients; peers are PyTorch's operators, one after the other, in the same type, here and on
    the device, and in both layouts of memory, for which libraries have other ways to add: on some processors they err
    four times as much in channels-last memory.
    """
    made = case.tensors()
    channels = case.out // 2 if case.gate else case.out
    grad = normal(case.shape[0], channels, *case.shape[2:], seed=5, dtype=case.dtype)
    results = []
    layouts = (torch.contiguous_format, torch.channels_last)
    peers = [(by_torch, case.dtype, place, layout) for place in {"cpu", device} for layout in layouts]
    for convolve, dtype, place, layout in [(by_loop, torch.float64, "cpu", torch.contiguous_format), *peers]:
        leaves = {name: value.to(place, dtype).requires_grad_() for name, value in made.items()}
        with full_float32(torch.device(place)):
            x = activate(leaves["x"], case.activation).contiguous(memory_format=layout)
            product = convolve(x, leaves["weight"], case.mask, case.form)
            out = surround(case, leaves, product)
            grads = torch.autograd.grad(out, list(leaves.values()), grad.to(place, dtype), materialize_grads=True)
        results.append([out.detach(), *grads])
    found = run(case, {name: value.to(device) for name, value in made.items()}, grad.to(device))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for name, mine, want, *others in zip(("out", *made), found, *results, strict=True):
        close(name, mine, want, *others)
    behind = ~read_taps(case.kernel, case.mask, case.form)
    assert (found[2].cpu()[:, :, behind] == 0).all()


BFLOAT16 = torch.bfloat16
# Even and odd kernels, a grid of one row, taps that lie above or left of all of it, wide and ragged blocks.
CASES = {
    "strict-rows-3": Case(3, shape=(2, 19, 5, 6), out=21),
    "inclusive-rows-4": Case(4, "inclusive", "rows", "elu", (2, 19, 5, 6), 21, residual=True),
    "strict-symmetric-5": Case(5, "strict", "symmetric", "concat_elu", (2, 7, 5, 6), 22, context="grid", gate=True),
    "inclusive-symmetric-6": Case(6, "inclusive", "symmetric", "elu", (2, 7, 3, 4), 22, context="sample"),
    "one-row": Case(5, "strict", "rows", "elu", (2, 7, 1, 9), 22, gate=True, residual=True),
    "one-column": Case(3, "strict", "rows", "concat_elu", (2, 7, 9, 1), 22, gate=True, residual=True),
    "pointwise": Case(1, "inclusive", "rows", "concat_elu", (2, 7, 4, 3), 22, gate=True, residual=True),
    "nothing-is-read": Case(1, "strict", "rows", "elu", (2, 7, 4, 3), 22, context="sample", gate=True, residual=True),
    "wide": Case(3, "strict", "rows", "concat_elu", (2, 70, 6, 7), 150, context="grid", gate=True, residual=True),
    "bfloat16": Case(3, "strict", "rows", "concat_elu", (2, 24, 6, 7), 48, BFLOAT16, "grid", True, True),
    "bfloat16-plain": Case(5, "inclusive", "symmetric", None, (2, 24, 6, 7), 48, BFLOAT16),
    "bfloat16-pointwise": Case(1, "inclusive", "rows", "elu", (2, 23, 4, 3), 34, BFLOAT16, "grid", True),
    "bfloat16-product": Case(1, "inclusive", "rows", "concat_elu", (2, 9, 4, 3), 32, BFLOAT16),
    "bfloat16-one-tap-of-two-rows": Case(2, "strict", "rows", "elu", (2, 23, 4, 3), 11, BFLOAT16, residual=True),
    "float16": Case(4, "strict", "rows", "elu", (2, 24, 6, 7), 48, torch.float16, "sample", True, True),
}


def no_samples(device: str) -> None:
    case = Case(3, "strict", "rows", "elu", (0, 3, 4, 5), 6, context="sample", gate=True, residual=True)
    made = {name: value.to(device) for name, value in case.tensors().items()}
    out, *grads = run(case, made, torch.zeros(0, 3, 4, 5, device=device))
    assert out.shape == (0, 3, 4, 5)
    for grad, value in zip(grads, made.values(), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


def wider_residual(device: str) -> None:
    """Under autocast the trunk stays float32: it is added before anything is rounded."""
    case = Case(3, "strict", "rows", "elu", (2, 7, 4, 5), 14, BFLOAT16, gate=True, residual=True)
    made = {name: value.to(device) for name, value in case.tensors().items()}
    made["residual"] = made["residual"].float() + 2**-10
    how = {"activation": "elu", "gate": True}
    out = fused_causal_conv2d(**made, **how, backend="fused")
    assert out.dtype == torch.float32
    want = fused_causal_conv2d_reference(**{name: value.cpu().double() for name, value in made.items()}, **how)
    assert (out.cpu().double() - want).abs().max() < 2**-7


def autocast(device: str) -> None:
    """Tensors of float32 are read as bfloat16 where they are multiplied; gradients are of their own types."""
    for case in (
        Case(3, "strict", "rows", "elu", (2, 7, 4, 5), 14, context="grid", gate=True, residual=True),
        Case(1, "inclusive", "rows", "concat_elu", (2, 7, 4, 5), 14, context="sample", gate=True, residual=True),
        Case(1, "inclusive", "rows", "elu", (2, 16, 4, 5), 32),
        Case(2, "inclusive", "symmetric", None, (2, 7, 4, 5), 14),
    ):
        made = {name: value.to(device) for name, value in case.tensors().items()}
        grad = normal(2, case.out // 2 if case.gate else case.out, 4, 5, seed=5).to(device)
        want = run(case, made, grad)
        leaves = {name: value.detach().requires_grad_() for name, value in made.items()}
        tensors = [leaves.get(name) for name in ("x", "weight", "bias", "context", "residual")]
        if tensors[3] is not None:
            tensors[3] = tensors[3].to(BFLOAT16)
        options = Options(case.mask, case.form, case.activation, case.gate, case.gate, "fused", BFLOAT16)
        out = backends.causal_conv2d(*tensors, options=options, direct=True, learns=True)[0]
        assert out.dtype == (torch.float32 if case.residual else BFLOAT16)
        found = [out, *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))]
        for name, mine, exact in zip(("out", *made), found, want, strict=True):
            assert name == "out" or mine.dtype == torch.float32
            assert (mine - exact).abs().max() <= 0.02 * exact.abs().max(), name


class Made(NamedTuple):
    """A block's tensors and how they are used."""

    kernels: tuple[int, int]
    activations: tuple[Any, Any]
    contexts: tuple[str | None, str | None]
    form: Any = "rows"
    channels: int = 5
    hidden: int = 6

    def tensors(self, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        wide = [2 if kind == "concat_elu" else 1 for kind in self.activations]
        shapes = {"x": (2, self.channels, 4, 5)}
        outs = self.hidden, 2 * self.channels
        ins = wide[0] * self.channels, wide[1] * self.hidden
        for name, out, depth, kernel, context in zip(("1", "2"), outs, ins, self.kernels, self.contexts, strict=True):
            shapes |= {"weight" + name: (out, depth, kernel, kernel), "bias" + name: (out,)}
            if context:
                shapes["context" + name] = (2, out, *((1, 1) if context == "sample" else (4, 5)))
        found = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
        return {
            name: (value / value[0].numel() ** 0.5 if name.startswith("weight") else value).to(device, dtype)
            for name, value in found.items()
        }

    def steps(self, tensors: dict[str, Tensor]) -> list[Step]:
        return [
            Step(
                *(tensors.get(what + name) for what in ("weight", "bias", "context")),
                "inclusive" if kernel == 1 else "strict",
                self.form,
                activation,
                name == "2",
            )
            for name, kernel, activation in zip(("1", "2"), self.kernels, self.activations, strict=True)
        ]

    def exact(self, tensors: dict[str, Tensor]) -> Tensor:
        first, second = self.steps(tensors)
        h = fused_causal_conv2d_reference(tensors["x"], residual=None, **first._asdict())
        return fused_causal_conv2d_reference(h, residual=tensors["x"], **second._asdict())

    def differentiated(self, device: str) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
        """Leaves, a gradient of the output, and in float64 the output and the gradients of the leaves."""
        leaves = {name: value.requires_grad_() for name, value in self.tensors(device).items()}
        exact = {name: value.requires_grad_() for name, value in self.tensors(device, torch.float64).items()}
        want = self.exact(exact)
        upstream = normal(*want.shape, seed=9).to(device)
        return leaves, upstream, [want, *torch.autograd.grad(want, list(exact.values()), upstream.double())]


MADE = (
    Made((3, 3), ("elu", "elu"), ("grid", "sample")),
    Made((3, 1), ("concat_elu", "concat_elu"), (None, None), "symmetric"),
    Made((1, 3), (None, "elu"), ("sample", "grid")),
    Made((1, 1), ("elu", None), (None, "sample"), channels=16, hidden=32),
)


@contextlib.contextmanager
def one_step() -> Iterator[None]:
    """Blocks take one step wherever they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "runs_blocks", lambda *given: True)
        yield


def blocks(device: str) -> None:
    """A whole block's output and gradients; of some tensors alone they are the same."""
    for made in MADE:
        leaves, upstream, want = made.differentiated(device)
        with one_step(), full_float32(torch.device(device)):
            out = gated_block(leaves["x"], *made.steps(leaves))
            assert type(out.grad_fn).__name__ == "_BlockBackward"
            found = torch.autograd.grad(out, list(leaves.values()), upstream)
        assert out.is_contiguous(memory_format=torch.channels_last)
        for name, mine, right in zip(("out", *leaves), (out, *found), want, strict=True):
            assert (mine - right).abs().max() <= 2e-5 * right.abs().max().clamp(min=1), name
        for names in (["x"], ["weight1"], ["bias1"], ["weight2", "bias2"], [n for n in leaves if "context" in n]):
            some = {name: value.detach().requires_grad_(name in names) for name, value in leaves.items()}
            if names:
                with one_step(), full_float32(torch.device(device)):
                    out = gated_block(some["x"], *made.steps(some))
                    again = torch.autograd.grad(out, [some[name] for name in names], upstream)
                for name, mine in zip(names, again, strict=True):
                    torch.testing.assert_close(mine, found[list(leaves).index(name)], rtol=1e-5, atol=1e-5)


def blocks_under_autocast(device: str) -> None:
    for made in MADE:
        leaves, upstream, want = made.differentiated(device)
        with one_step(), torch.autocast(device, BFLOAT16):
            out = gated_block(leaves["x"], *made.steps(leaves))
        assert type(out.grad_fn).__name__ == "_BlockBackward"
        found = torch.autograd.grad(out, list(leaves.values()), upstream)
        for name, mine, right in zip(("out", *leaves), (out, *found), want, strict=True):
            assert mine.dtype == torch.float32
            assert (mine - right).abs().max() <= 0.03 * right.abs().max(), name


def blocks_refuse(device: str) -> None:
    """What does not fit, and gradients of gradients."""
    made = MADE[0]
    leaves = {name: value.requires_grad_() for name, value in made.tensors(device).items()}
    with one_step(), full_float32(torch.device(device)):
        first, second = made.steps(leaves)
        out = gated_block(leaves["x"], first, second)
        upstream = normal(*out.shape, seed=9).to(device)
        want = torch.autograd.grad(out, list(leaves.values()), upstream, retain_graph=True)
        found = torch.autograd.grad(out, list(leaves.values()), upstream, create_graph=True)
        for mine, right in zip(found, want, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        with refuses(UnavailableError, "causal_conv2d: the gradient cannot be differentiated again"):
            torch.autograd.grad(found[0].square().sum(), leaves["x"])
        with refuses(ArgumentError, r"weight: expected shape \[O, 6, k, 3\]"):
            gated_block(leaves["x"], first, second._replace(weight=leaves["weight1"]))


def nothing_leaks(device: str) -> None:
    """NaN behind the mask or at later positions reaches no output, nor through gradients any input before."""
    for mask, form in (("strict", "rows"), ("inclusive", "symmetric")):
        case = Case(3, mask, form, "concat_elu", (2, 5, 4, 3), 6)
        made = {name: value.to(device) for name, value in case.tensors().items()}
        grad = normal(2, 6, 4, 3, seed=5).to(device)
        clean = run(case, made, grad)
        made["weight"][:, :, ~read_taps(3, mask, form)] = torch.nan
        for mine, theirs in zip(run(case, made, grad), clean, strict=True):
            assert torch.equal(mine, theirs)
        for position in (0, 1, 5, 11):
            poisoned = {**made, "x": made["x"].clone()}
            poisoned["x"].flatten(2)[:, :, position:] = torch.nan
            free = position + (mask == "strict")
            out = run(case, poisoned, grad)[0].flatten(2)
            assert torch.equal(out[:, :, :free], clean[0].flatten(2)[:, :, :free])
            assert out[:, :, free:].isnan().any() == (free < 12)
            upstream = grad.clone()
            upstream.flatten(2)[:, :, : position + 1] = torch.nan
            of_x = run(case, made, upstream)[1].flatten(2)
            assert of_x[:, :, position + (mask == "inclusive") :].isfinite().all()


def poisoned_memory(device: str) -> None:
    """Every element of every result is written, whatever was in memory before."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.zeros(1, device=device).new_empty(64).isnan().all()
        agrees(CASES["strict-symmetric-5"], device)
        agrees(CASES["nothing-is-read"], device)
    finally:
        torch.use_deterministic_algorithms(False)


def only_some_gradients(device: str) -> None:
    case = CASES["strict-symmetric-5"]
    made = {name: value.to(device) for name, value in case.tensors().items()}
    grad = normal(2, 11, 5, 6, seed=5).to(device)
    every = dict(zip(("out", *made), run(case, made, grad), strict=True))
    how = {"mask": case.mask, "form": case.form, "activation": case.activation, "gate": True, "backend": "fused"}
    for names in (["x"], ["weight"], ["bias"], ["context"], ["x", "context"]):
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in made.items()}
        out = fused_causal_conv2d(**leaves, **how)
        for name, found in zip(names, torch.autograd.grad(out, [leaves[n] for n in names], grad), strict=True):
            torch.testing.assert_close(found, every[name], rtol=1e-5, atol=1e-5)


GROUPS: dict[str, dict[str, Check]] = {
    "cases": {name: partial(agrees, case) for name, case in CASES.items()},
    "memory": {
        check.__name__.replace("_", "-"): check
        for check in (
            no_samples,
            wider_residual,
            autocast,
            blocks,
            blocks_under_autocast,
            blocks_refuse,
            nothing_leaks,
            poisoned_memory,
            only_some_gradients,
        )
    },
}

test_interpreted, test_on_a_gpu = checked_in_both(__file__, GROUPS)


if __name__ == "__main__":
    serve(GROUPS)
