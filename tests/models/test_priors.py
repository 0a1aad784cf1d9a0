"""Priors: exact causality over every earlier position that a layer can reach, conditions, labels, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import pixelcnn, random_codes, refuses, snail
from torch import Tensor

from fastvq.errors import ArgumentError, ArgumentTypeError
from fastvq.models import PixelSNAIL, Prior
from fastvq.models.blocks import CausalConv2d, CodeConv2d, GatedBlock
from fastvq.ops.grid import FORMS, MASKS

pytestmark = pytest.mark.usefixtures("steady")

NUM_CODES = 5
# Grid, and the grids of up to two levels above it, top first.
GRIDS: list[tuple[tuple[int, int], list[tuple[int, int]]]] = [
    ((3, 4), [(1, 2), (3, 2)]),
    ((1, 8), [(1, 2), (1, 4)]),
    ((8, 1), [(2, 1), (8, 1)]),
    ((4, 3), [(2, 1), (2, 3)]),
]
Taps = Iterable[tuple[int, int]]


def name(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={name(part)}" for key, part in value.items())
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value)


def conditioned(grid: tuple[int, int], above: list[tuple[int, int]], levels: int) -> dict[str, Any]:
    """Configuration of a prior under ``levels`` levels of 3, 4 codes."""
    return {
        "shape": grid,
        "condition_shapes": tuple(above[:levels]),
        "condition_num_codes": (3, 4)[:levels],
    }


def inputs(prior: Prior, batch: int) -> dict[str, Any]:
    """A condition and labels such as the prior expects."""
    config = prior.config
    condition = [
        random_codes(batch, *shape, num_codes=count, seed=level)
        for level, (shape, count) in enumerate(zip(config.condition_shapes, config.condition_num_codes, strict=True))
    ]
    label = None if config.num_classes is None else torch.arange(batch) % config.num_classes
    return {"condition": condition or None, "label": label}


def dependence(prior: Prior) -> Tensor:
    """bool [N, N]: entry (p, q) says whether changing the code at p changes any logit at q.

    Each change is compared with the unchanged grid in the same place of a batch of the same size, where libraries
    round alike, so equality is exact.
    """
    height, width = prior.config.shape
    count = height * width
    found = torch.zeros(count, count, dtype=torch.bool)
    for seed in range(2):
        codes = random_codes(1, height, width, num_codes=NUM_CODES, seed=seed).expand(count, -1, -1)
        changed = codes.clone()
        changed.flatten(1).diagonal()[:] = (changed.flatten(1).diagonal() + 1 + seed) % NUM_CODES
        given = inputs(prior, count)
        with torch.no_grad():
            before, after = prior(codes, **given), prior(changed, **given)
        assert before.isfinite().all()
        assert after.isfinite().all()
        found |= (before != after).any(dim=1).flatten(1)
    return found


def pairs(matrix: Tensor) -> list[tuple[int, int]]:
    return [(int(p), int(q)) for p, q in matrix.nonzero()]


class Reach:
    """Which codes the feature at each position can depend on, layer by layer: bool [N, N], entry (p, q) as above."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.positions = list(itertools.product(range(grid[0]), range(grid[1])))
        self.codes = torch.eye(len(self.positions), dtype=torch.bool)

    def through(self, taps: Taps, features: Tensor) -> Tensor:
        out = torch.zeros_like(features)
        for q, (row, column) in enumerate(self.positions):
            for up, left in taps:
                there = (row + up, column + left)
                if there in self.positions:
                    out[:, q] |= features[:, self.positions.index(there)]
        return out

    def snail(self, prior: PixelSNAIL) -> Tensor:
        config = prior.config
        inclusive = config.mask == "inclusive"
        above = config.kernel_size - 1 if config.form == "rows" else config.kernel_size // 2
        left = config.kernel_size // 2
        right = config.kernel_size - 1 - left
        conv = [(r, c) for r in range(-above, 0) for c in range(-left, right + 1)]
        conv += [(0, c) for c in range(-left, int(inclusive))]
        reach = config.kernel_size // 2
        first = [(r, c) for r in range(-reach, 0) for c in range(-reach, reach + 1)]
        x = self.through(first + [(0, c) for c in range(-reach, 0)], self.codes)
        for _ in range(config.blocks):
            features = x
            for _ in range(config.layers_per_block):
                features = features | self.through(conv, self.through(conv, features))
            if config.attention:
                sources = x | features
                seen = [sources[:, : q + inclusive].any(dim=1) for q in range(len(self.positions))]
                features = features | torch.stack(seen, dim=1)
            x = features
        return x

    def pixelcnn(self, kernel: int, layers: int) -> Tensor:
        reach = kernel // 2
        rows_above = [(r, c) for r in range(-reach, 0) for c in range(-reach, reach + 1)]
        current_rows = [(r, c) for r in range(-reach, 1) for c in range(-reach, reach + 1)]
        v = self.through(rows_above, self.codes)
        h = v | self.through([(0, c) for c in range(-reach, 0)], self.codes)
        for _ in range(layers):
            v = self.through(current_rows, v)
            h = h | v | self.through([(0, c) for c in range(-reach, 1)], h)
        return h


def masked_entries(layer: CausalConv2d) -> Tensor:
    """bool [k, k]: which weights lie behind the mask."""
    kernel = layer.weight.shape[-1]
    above = kernel - 1 if layer.form == "rows" else kernel // 2
    row = torch.arange(kernel)[:, None] - above
    column = torch.arange(kernel)[None, :] - kernel // 2
    last = 0 if layer.mask == "inclusive" else -1
    return (row > 0) | ((row == 0) & (column > last))


def poison(prior: Prior) -> int:
    """Write NaN into every masked weight; returns how many there were."""
    count = 0
    for layer in prior.modules():
        if isinstance(layer, CausalConv2d):
            masked = masked_entries(layer)
            with torch.no_grad():
                layer.weight[:, :, masked] = float("nan")
            count += int(masked.sum()) * layer.weight.shape[0] * layer.weight.shape[1]
    return count


SNAILS = [
    {"mask": mask, "form": form, "kernel_size": kernel, "attention": attention, "activation": activation}
    for mask, form, kernel, attention, activation in itertools.product(
        MASKS, FORMS, (2, 3, 4, 5), (True, False), ("elu", "concat_elu")
    )
]


@pytest.mark.parametrize("num_classes", [None, 3], ids=["no-label", "label"])
@pytest.mark.parametrize("levels", [0, 1, 2], ids=lambda levels: f"{levels}-above")
@pytest.mark.parametrize("fields", SNAILS, ids=name)
def test_snail_is_causal(fields: dict[str, Any], levels: int, num_classes: int | None) -> None:
    grid, above = GRIDS[(SNAILS.index(fields) + levels + bool(num_classes)) % len(GRIDS)]
    prior = snail(**fields, **conditioned(grid, above, levels), num_classes=num_classes).double()
    # A kernel of 2 ends at the current position: inclusive masks leave nothing of it out.
    assert (poison(prior) > 0) == (fields["kernel_size"] > 2 or fields["mask"] == "strict")
    expected = Reach(grid).snail(prior)
    assert not expected.tril().any()
    assert pairs(dependence(prior)) == pairs(expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_snail_with_attention_reads_the_earlier_codes(mask: Any, form: Any) -> None:
    """All of them but one: attention at q finds what position p < q knew, which is not yet the code at p.

    That code comes by convolution or from a position between; for the last of a row there is none until the kernel
    reaches it.
    """
    prior = snail(shape=(4, 5), mask=mask, form=form, blocks=2, layers_per_block=2, output_blocks=1).double()
    assert poison(prior) > 0
    found = pairs(dependence(prior))
    assert found == pairs(Reach((4, 5)).snail(prior))
    late = [(5 * row - 1, 5 * row + column) for row in (1, 2, 3) for column in (0, 1, 2)]
    assert sorted(found + late) == list(itertools.combinations(range(20), 2))


@pytest.mark.parametrize("mask", MASKS)
def test_snail_is_causal_in_float32(mask: Any) -> None:
    prior = snail(shape=(4, 5), mask=mask, channels=8, kernel_size=5, num_classes=3)
    assert poison(prior) > 0
    assert pairs(dependence(prior)) == pairs(Reach((4, 5)).snail(prior))


@pytest.mark.parametrize("num_classes", [None, 3], ids=["no-label", "label"])
@pytest.mark.parametrize("levels", [0, 1, 2], ids=lambda levels: f"{levels}-above")
@pytest.mark.parametrize("grid", range(len(GRIDS)), ids=lambda index: name(GRIDS[index][0]))
@pytest.mark.parametrize(("kernel", "layers"), [(3, 0), (3, 2), (5, 1)])
def test_pixelcnn_is_causal(kernel: int, layers: int, grid: int, levels: int, num_classes: int | None) -> None:
    shape, above = GRIDS[grid]
    fields = {"kernel_size": kernel, "layers": layers, "num_classes": num_classes}
    prior = pixelcnn(**fields, **conditioned(shape, above, levels)).double()
    expected = Reach(shape).pixelcnn(kernel, layers)
    assert not expected.tril().any()
    assert pairs(dependence(prior)) == pairs(expected)


def test_pixelcnn_has_no_blind_spot() -> None:
    prior = pixelcnn(shape=(4, 5), layers=4).double()
    assert pairs(dependence(prior)) == list(itertools.combinations(range(20), 2))


PRIORS: dict[str, Any] = {
    "strict": lambda **fields: snail(mask="strict", **fields),
    "inclusive": lambda **fields: snail(mask="inclusive", form="symmetric", activation="concat_elu", **fields),
    "no-attention": lambda **fields: snail(attention=False, kernel_size=5, output_blocks=1, **fields),
    "pixelcnn": pixelcnn,
}
each_prior = pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())


@each_prior
@pytest.mark.parametrize("levels", [0, 2], ids=lambda levels: f"{levels}-above")
def test_some_rows_give_the_logits_of_all(make: Any, levels: int) -> None:
    prior = make(**conditioned((4, 6), [(1, 3), (2, 3)], levels), num_classes=3).double()
    codes, given = random_codes(3, 4, 6), inputs(prior, 3)
    with torch.no_grad():
        whole = prior(codes, **given)
        assert whole.shape == (3, NUM_CODES, 4, 6)
        for rows in range(1, 5):
            part = prior(codes[:, :rows], **given)
            torch.testing.assert_close(part, whole[:, :, :rows], rtol=1e-11, atol=1e-12)


@each_prior
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(make: Any, batch: int) -> None:
    prior = make(**conditioned((3, 4), [(1, 2)], 1), num_classes=3)
    assert prior(random_codes(batch, 3, 4), **inputs(prior, batch)).shape == (batch, NUM_CODES, 3, 4)


@each_prior
def test_every_code_above_and_the_label_matter(make: Any) -> None:
    prior = make(**conditioned((4, 6), [(1, 3), (2, 3)], 2), num_classes=3).double()
    codes = random_codes(1, 4, 6)
    condition, label = [random_codes(1, 1, 3, num_codes=3), random_codes(1, 2, 3, num_codes=4)], torch.tensor([1])
    with torch.no_grad():
        before = prior(codes, condition, label)
        assert (prior(codes, condition, torch.tensor([2])) != before).any(dim=1).all()
        for level, grid in enumerate(condition):
            for position in range(grid.numel()):
                changed = [above.clone() for above in condition]
                changed[level].flatten()[position] = (changed[level].flatten()[position] + 1) % 3
                after = prior(codes, changed, label)
                row, column = (4 // grid.shape[1]) * (position // 3), 2 * (position % 3)
                # At the very place below the changed code the logits know of it, from the first position on.
                assert (after != before).any(dim=1)[0, row, column]


def test_a_condition_may_come_as_one_tensor_or_in_a_sequence() -> None:
    prior = snail(**conditioned((3, 4), [(1, 2)], 1))
    codes, above = random_codes(2, 3, 4), random_codes(2, 1, 2, num_codes=3)
    assert torch.equal(prior(codes, above), prior(codes, [above]))
    assert torch.equal(prior(codes, above), prior(codes.int(), (above.to(torch.uint8),)))


@each_prior
def test_gradients_are_finite_and_stay_out_of_masked_weights(make: Any) -> None:
    prior = make(**conditioned((3, 4), [(1, 2), (3, 2)], 2), num_classes=3).double()
    poison(prior)
    loss = prior.nll(random_codes(4, 3, 4), **inputs(prior, 4)).mean()
    loss.backward()
    layers = 0
    for layer in prior.modules():
        if isinstance(layer, CausalConv2d):
            layers += 1
            masked = masked_entries(layer)
            grad = layer.weight.grad
            assert grad is not None
            assert masked.any()
            assert (grad[:, :, masked] == 0).all()
            # Rows that only see padding in a grid this small have no gradient; the current row has.
            assert (grad[:, :, ~masked][..., -1] != 0).any()
    assert (layers > 0) == isinstance(prior, PixelSNAIL)
    for label, parameter in prior.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label
        assert (parameter.grad != 0).any(), label


@each_prior
def test_nll_is_the_negative_logarithm_of_the_softmax(make: Any) -> None:
    prior = make()
    codes = random_codes(2, 3, 4)
    with torch.no_grad():
        want = -prior(codes).double().log_softmax(1).gather(1, codes[:, None]).squeeze(1)
        nll = prior.nll(codes)
    assert nll.shape == (2, 3, 4)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [snail, pixelcnn])
def test_dropout_is_active_in_training_alone(make: Any) -> None:
    torch.manual_seed(0)
    dropping = make(dropout=0.5)
    torch.manual_seed(0)
    plain = make()
    codes = random_codes(2, 3, 4)
    assert torch.equal(dropping(codes), plain(codes))
    dropping.train()
    assert not torch.equal(dropping(codes), dropping(codes))
    torch.manual_seed(1)
    first = dropping(codes)
    torch.manual_seed(1)
    assert torch.equal(dropping(codes), first)
    # The first position knows no codes, so only dropout moves it.
    assert not torch.equal(dropping(codes)[:, :, 0, 0], first[:, :, 0, 0])


def test_dropout_of_attention_is_active_in_training_alone() -> None:
    torch.manual_seed(0)
    dropping = snail(attention_dropout=0.5)
    torch.manual_seed(0)
    plain = snail()
    codes = random_codes(2, 3, 4)
    assert torch.equal(dropping(codes), plain(codes))
    dropping.train()
    # Positions 0 and 1 have no choice between keys.
    before, after = (dropping(codes).flatten(2) for _ in range(2))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("mask", MASKS)
def test_dropout_keeps_training_causal(mask: Any) -> None:
    prior = snail(mask=mask, dropout=0.3, attention_dropout=0.3).double().train()
    codes = random_codes(1, 3, 4).expand(12, -1, -1)
    changed = codes.clone()
    changed.flatten(1).diagonal()[:] = (changed.flatten(1).diagonal() + 1) % NUM_CODES
    torch.manual_seed(3)
    before = prior(codes)
    torch.manual_seed(3)
    moved = (before != prior(changed)).any(dim=1).flatten(1)
    assert not moved.tril().any()
    assert moved.any()


@pytest.mark.parametrize("activation", ["elu", "concat_elu"])
def test_gated_block_equals_its_formula(activation: Any) -> None:
    """x + a * sigmoid(b), where (a, b) = W2 act(W1 act(x) + A act(aux)) + C context."""
    block = GatedBlock(3, 4, context_channels=2, aux_channels=5, activation=activation).double()
    x, context, aux = (torch.randn(2, channels, 1, 1, dtype=torch.float64) for channels in (3, 2, 5))

    def act(value: Tensor) -> Tensor:
        wide = torch.cat([value, -value], dim=-1) if activation == "concat_elu" else value
        return torch.where(wide > 0, wide, wide.exp() - 1)

    def linear(layer: Any, value: Tensor) -> Tensor:
        out = value @ layer.weight[:, :, 0, 0].T
        return out if layer.bias is None else out + layer.bias

    flat, flat_context, flat_aux = (value[:, :, 0, 0] for value in (x, context, aux))
    inner = linear(block.conv1, act(flat)) + linear(block.aux, act(flat_aux))
    outer = linear(block.conv2, act(inner)) + linear(block.context, flat_context)
    want = flat + outer[:, :3] / (1 + (-outer[:, 3:]).exp())
    torch.testing.assert_close(block(x, context, aux)[:, :, 0, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", ["first", "causal"])
def test_weights_start_at_the_scale_of_what_is_read(layer: str) -> None:
    """PyTorch's default for convolutions: uniform within 1 / sqrt(fan-in), with masked taps left out of the fan-in."""
    if layer == "first":
        made: CausalConv2d | CodeConv2d = CodeConv2d(50, 40, [(-1, 0), (0, -2), (0, -1)])
        bound = 3**-0.5
    else:
        made = CausalConv2d(6, 40, 4, mask="strict", form="rows")
        bound = (6 * (3 * 4 + 2)) ** -0.5
    assert 0.98 * bound < made.weight.abs().max() <= bound
    assert made.bias.abs().max() <= bound


CONDITIONED = {"shape": (4, 6), "condition_shapes": ((2, 3),), "condition_num_codes": (3,), "num_classes": 4}
CODES, ABOVE, LABEL = torch.zeros(2, 4, 6).long(), torch.zeros(2, 2, 3).long(), torch.zeros(2).long()


@pytest.mark.parametrize("make", [snail, pixelcnn])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codes": [[0]]}, ArgumentTypeError, "codes: expected a torch.Tensor, got list"),
        ({"codes": torch.tensor(3)}, ArgumentError, "codes: expected shape"),
        ({"codes": CODES.float()}, ArgumentTypeError, "codes: expected an integer tensor, got torch.float32"),
        ({"codes": CODES.bool()}, ArgumentTypeError, "codes: expected an integer tensor, got torch.bool"),
        ({"codes": CODES[:, :, :5]}, ArgumentError, "codes: expected shape"),
        ({"codes": CODES[:, :0]}, ArgumentError, "codes: expected 1 to 4 rows, got 0"),
        ({"codes": torch.zeros(2, 5, 6).long()}, ArgumentError, "codes: expected 1 to 4 rows, got 5"),
        ({"codes": CODES + 5}, ArgumentError, "codes: values must lie in 0..4, got 5"),
        ({"codes": CODES - 1}, ArgumentError, "codes: values must lie in 0..4, got -1"),
        ({"condition": None}, ArgumentError, "condition: this prior expects codes of 1 level"),
        ({"condition": [ABOVE, ABOVE]}, ArgumentError, "condition: this prior expects codes of 1 level"),
        ({"condition": 7}, ArgumentTypeError, "condition: expected a tensor, a sequence of tensors or None, got int"),
        ({"condition": [[0]]}, ArgumentTypeError, r"condition\[0\]: expected a torch.Tensor, got list"),
        ({"condition": ABOVE.float()}, ArgumentTypeError, r"condition\[0\]: expected an integer tensor"),
        ({"condition": ABOVE[:1]}, ArgumentError, r"condition\[0\]: expected shape \[2, 2, 3\]"),
        ({"condition": ABOVE + 3}, ArgumentError, r"condition\[0\]: values must lie in 0..2, got 3"),
        ({"label": None}, ArgumentError, r"label: this prior is class-conditional, expected int \[2\] in 0..3"),
        ({"label": 1}, ArgumentTypeError, "label: expected a torch.Tensor, got int"),
        ({"label": LABEL.float()}, ArgumentTypeError, "label: expected an integer tensor"),
        ({"label": LABEL[:1]}, ArgumentError, r"label: expected shape \[2\]"),
        ({"label": LABEL + 4}, ArgumentError, "label: values must lie in 0..3, got 4"),
        ({"label": LABEL - 1}, ArgumentError, "label: values must lie in 0..3, got -1"),
    ],
    ids=lambda value: name({k: type(v).__name__ for k, v in value.items()}) if isinstance(value, dict) else None,
)
def test_refuses(make: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    prior = make(**CONDITIONED)
    with refuses(error, message):
        prior(**{"codes": CODES, "condition": ABOVE, "label": LABEL, **arguments})


def test_refuses_what_it_was_not_made_for() -> None:
    prior = snail()
    codes = random_codes(2, 3, 4)
    with refuses(ArgumentError, "label: this prior is not class-conditional"):
        prior(codes, label=LABEL)
    with refuses(ArgumentError, "condition: this prior expects None, got 1 tensor"):
        prior(codes, ABOVE)
