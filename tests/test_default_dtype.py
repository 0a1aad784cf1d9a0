"""Under another default type (torch.set_default_dtype) everything gives for float32 tensors what it always does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_helpers import CACHED, grids, needs_extension, spread
from helpers import pixelcnn, snail
from torch import Tensor

from fastvq import FSQ, LFQ, VQVAE2, Pipeline, ResidualVQ, SimVQ, VectorQuantizer, explain, sample
from fastvq.ops import causal_attention, causal_conv2d, ema_update, nearest_code, nearest_code_statistics
from fastvq.ops.draw import draw
from fastvq.sampling import Samples

TYPES = (torch.float64, torch.bfloat16, torch.float16)
Result = Any


@pytest.fixture(params=TYPES, ids=str)
def switch(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Makes another type the default; what a test makes before is of the usual one."""
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def assert_same(found: Result, wanted: Result) -> None:
    """Bit by bit, types included."""
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    elif isinstance(wanted, (tuple, list)):
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, Samples):
        assert_same([*vars(found).values()], [*vars(wanted).values()])
    else:
        assert found == wanted


QUANTIZERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: VectorQuantizer(16, 8),
    "data": lambda: VectorQuantizer(16, 8, init="data"),
    "kmeans": lambda: VectorQuantizer(16, 8, init="kmeans"),
    "revived": lambda: VectorQuantizer(64, 8, revive_below=2.0),
    "cosine": lambda: VectorQuantizer(16, 8, metric="cosine"),
    "heads": lambda: VectorQuantizer(16, 4, heads=2),
    "head-codebooks": lambda: VectorQuantizer(16, 4, heads=2, separate_codebook_per_head=True),
    "learnable": lambda: VectorQuantizer(16, 8, learnable_codebook=True),
    "rotation": lambda: VectorQuantizer(16, 8, gradient="rotation"),
    "residual": lambda: ResidualVQ(3, 16, 8),
    "residual-shared": lambda: ResidualVQ(3, 16, 8, shared_codebook=True),
    "projected": lambda: VectorQuantizer(16, 4, input_dim=8),
    "residual-projected": lambda: ResidualVQ(3, 16, 4, input_dim=8),
    "simvq": lambda: SimVQ(16, 8),
    "fsq": lambda: FSQ((4, 5), heads=4),
    "lfq": lambda: LFQ(4, heads=2, temperature=0.5),
}


def steps(quantizer: Any, x: Tensor) -> Result:
    torch.manual_seed(1)
    outputs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf)
        (out.quantized.square().sum() + out.loss).backward()
        outputs.append([value.detach() for value in out] + [leaf.grad])
    codes = quantizer.encode(x)
    return [outputs, codes, quantizer.lookup(codes).detach(), list(quantizer.state_dict().values())]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantizers(kind: str, switch: Callable[[], None]) -> None:
    torch.manual_seed(0)
    quantizer, x = QUANTIZERS[kind](), torch.randn(300, 8)
    other = copy.deepcopy(quantizer)
    wanted = steps(quantizer, x)
    switch()
    assert_same(steps(other, x), wanted)


def test_quantizers_made_under_it(switch: Callable[[], None]) -> None:
    """Averages of 99 % are no numbers of bfloat16: a codebook that follows the data is float32 at least."""
    switch()
    quantizer = VectorQuantizer(16, 8)
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    for name in ("embedding", "cluster_size", "embedding_sum"):
        assert getattr(quantizer, name).dtype == wide, name
    x = torch.randn(300, 8)
    for _ in range(20):
        out = quantizer(x)
    assert out.quantized.dtype == x.dtype
    gaps = torch.cdist(x.double(), quantizer.embedding.double()).amin(1)
    assert float(gaps.square().mean()) < float(x.double().square().sum(1).mean())


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Result]] = {
    "nearest_code": lambda x, codes: nearest_code(x, codes),
    "nearest_code-torch": lambda x, codes: nearest_code(x, codes, backend="torch"),
    "statistics": lambda x, codes: nearest_code_statistics(x, codes),
    "statistics-masked": lambda x, codes: nearest_code_statistics(x, codes, mask=x[:, 0] > 0),
    "statistics-heads": lambda x, codes: nearest_code_statistics(
        x.view(2, -1, 8), codes.expand(2, -1, -1), metric="cosine"
    ),
    "statistics-torch": lambda x, codes: nearest_code_statistics(x, codes, backend="torch"),
    "draw": lambda x, codes: draw(x, codes.flatten().repeat(3)[:300].sigmoid(), top_p=0.9),
    "draw-torch": lambda x, codes: draw(x, codes.flatten().repeat(3)[:300].sigmoid(), top_k=5, backend="torch"),
    "causal_conv2d": lambda x, codes: causal_conv2d(x[:288].view(1, 8, 6, 48), codes[:9].repeat(8, 1).view(8, 8, 3, 3)),
    "causal_attention": lambda x, codes: causal_attention(*x[:288].view(3, 1, 2, 48, 8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, switch: Callable[[], None]) -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(300, 8), torch.randn(16, 8)
    wanted = OPERATIONS[name](x, codes)
    switch()
    assert_same(OPERATIONS[name](x, codes), wanted)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_extension), "torch"])
def test_ema_update(backend: str, switch: Callable[[], None]) -> None:
    torch.manual_seed(0)
    counts, sums = torch.randint(9, (16,)), torch.randn(16, 8)
    states = [[torch.ones(16), torch.randn(16, 8), torch.randn(16, 8)]]
    states.append([value.clone() for value in states[0]])
    ema_update(counts, sums, *states[0], decay=0.9, backend=backend)
    switch()
    ema_update(counts, sums, *states[1], decay=0.9, backend=backend)
    assert_same(states[1], states[0])


@needs_extension
@pytest.mark.parametrize("engine", [*CACHED, "naive"])
@pytest.mark.parametrize("kind", ["attention", "concat-elu", "conditioned", "pixelcnn"])
def test_engines(engine: str, kind: str, switch: Callable[[], None]) -> None:
    given: dict[str, Any] = {"condition_shapes": ((3, 2),), "condition_num_codes": (3,), "num_classes": 4}
    prior = spread(
        {
            "attention": lambda: snail(),
            "concat-elu": lambda: snail(
                mask="inclusive", activation="concat_elu", attention=False, residual_channels=6
            ),
            "conditioned": lambda: snail(**given),
            "pixelcnn": lambda: pixelcnn(**given),
        }[kind]()
    )
    _, told = grids(prior, 5)
    wanted = sample(prior, 5, seed=1, engine=engine, **told)
    said = str(explain(prior))
    fresh = copy.deepcopy(prior)  # nothing has been prepared for it
    switch()
    assert_same(sample(prior, 5, seed=1, engine=engine, **told), wanted)
    assert_same(sample(fresh, 5, seed=1, engine=engine, **told), wanted)
    assert str(explain(fresh)) == said


@needs_extension
@pytest.mark.parametrize("engine", [*CACHED, "naive"])
def test_pipelines(engine: str, switch: Callable[[], None]) -> None:
    pipeline = Pipeline.from_pretrained("digits")
    wanted = pipeline.sample(3, label=1, seed=0, engine=engine)
    switch()
    assert_same(pipeline.sample(3, label=1, seed=0, engine=engine), wanted)


def test_what_is_known(switch: Callable[[], None]) -> None:
    pipeline, mask = Pipeline.from_pretrained("digits"), torch.zeros(32, 32, dtype=torch.bool)
    mask[20:] = True

    def work() -> Result:
        image = pipeline.sample(1, label=[3], seed=0).images
        painted = pipeline.inpaint(image, mask, 2, label=[3, 7], seed=0)
        top = pipeline.encode(image)[:1]
        return painted, pipeline.sample(2, label=3, codes=top, seed=0), [*pipeline.frames(painted.codes)]

    wanted = work()
    switch()
    assert_same(work(), wanted)


@torch.no_grad()
def test_autoencoders(switch: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model, images = VQVAE2.from_preset("tiny").eval(), torch.randn(2, 1, 16, 16)
    wanted = [*model(images), model.encode(images), model.decode(model.encode(images))]
    switch()
    assert_same([*model(images), model.encode(images), model.decode(model.encode(images))], wanted)


@torch.no_grad()
def test_priors_made_under_it(switch: Callable[[], None]) -> None:
    """Places in the grid are exact whatever the type of the weights."""
    switch()
    prior = snail(shape=(3, 7))
    assert prior.output.weight.dtype == torch.get_default_dtype()
    rows = (torch.arange(3, dtype=torch.float64) - 1.5) / 3
    columns = (torch.arange(7, dtype=torch.float64) - 3.5) / 7
    torch.testing.assert_close(prior.background[0, 0, :, 0], rows.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(prior.background[0, 1, 0], columns.float(), rtol=0, atol=1e-7)
    codes = torch.randint(5, (2, 3, 7))
    assert prior(codes).dtype == torch.get_default_dtype()
    assert sample(prior, 2, seed=0).shape == (2, 3, 7)
