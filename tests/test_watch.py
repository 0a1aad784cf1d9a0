"""Every change of a tensor is noticed: snapshots of memory, and the cached engines that rest on them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from engine_helpers import needs_extension, spread
from helpers import pixelcnn, snail
from torch import Tensor, nn

from fastvq import _engine
from fastvq._watch import Snapshot, contents_of
from fastvq.models import Prior
from fastvq.sampling import sample
from fastvq.sampling.engines import plan_of, prepared

CACHED = ["torch", pytest.param("cpu", marks=needs_extension)]
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
]


@pytest.fixture(params=[pytest.param("extension", marks=needs_extension), "no-extension"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads memory on a CPU."""
    if request.param == "no-extension":
        monkeypatch.setattr(_engine, "available", lambda: False)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def noticed(tensors: list[Tensor], edit: Callable[..., object], *arguments: object) -> bool:
    snapshot = Snapshot(tensors)
    assert snapshot.matches(tensors)
    edit(*arguments)
    return not snapshot.matches(tensors)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31])
def test_every_byte(dtype: torch.dtype, count: int) -> None:
    tensor = torch.arange(count).remainder(2).to(torch.float32).to(dtype)
    for place in range(tensor.nbytes):
        # A bool of another value than 0 and 1 would be none.
        assert noticed([torch.ones(3), tensor], bytes_of(tensor)[place].bitwise_xor_, 1), place


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("distance", [1, 2, 16, 512, 1024, 2048, 4096, 2**15, 2**16])
def test_elements_that_trade_places(dtype: torch.dtype, distance: int) -> None:
    """Values of few digits, as far apart as words, tables of keys and powers of two are."""
    tensor = torch.ones(2**17, dtype=dtype)
    tensor[40_000] = 2
    places, swapped = [40_000, 40_000 + distance], [40_000 + distance, 40_000]

    def swap() -> None:
        tensor[places] = tensor[swapped]

    assert noticed([tensor], swap)


@pytest.mark.usefixtures("reader")
def test_rows_and_tensors_that_trade_places() -> None:
    table = torch.randn(64, 16)
    places, rows = torch.tensor([3, 60]), table[[60, 3]]
    assert noticed([table], table.index_copy_, 0, places, rows)
    one, two = torch.randn(100), torch.randn(100)

    def swap() -> None:
        kept = one.clone()
        one.copy_(two)
        two.copy_(kept)

    assert noticed([one, two], swap)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(torch.randn(5, 7).t(), id="transposed"),
        pytest.param(torch.randn(9, 8)[1::2, 1:6], id="strided"),
        pytest.param(torch.randn(30)[3:], id="slice"),
        pytest.param(torch.zeros(40, dtype=torch.uint8)[3:], id="not-aligned"),
        pytest.param(torch.randn(6, 1).expand(6, 4), id="expanded"),
        pytest.param(torch.tensor(3.0), id="scalar"),
        pytest.param(nn.Parameter(torch.randn(3, 4)), id="parameter"),
    ],
)
def test_every_element_of_a_layout(tensor: Tensor) -> None:
    for index in torch.ones(tensor.shape).nonzero().tolist():
        assert noticed([tensor], tensor.data[tuple(index)].add_, 1), index


@pytest.mark.usefixtures("reader")
def test_other_shapes_of_the_same_memory() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    assert noticed([weight], setattr, weight, "data", weight.data.t())
    assert noticed([weight], setattr, weight, "data", weight.data.t().view(2, 8))
    assert noticed([weight], setattr, weight, "data", weight.data[:1])


@pytest.mark.usefixtures("reader")
def test_tensors_without_memory() -> None:
    tensors = [torch.empty(0, 3), torch.empty(2, device="meta"), torch.empty(0, dtype=torch.bool)]
    assert Snapshot(tensors).matches(tensors)
    assert Snapshot([]).matches([])
    assert not Snapshot([]).matches(tensors)


@needs_extension
def test_equal_bytes_at_other_addresses() -> None:
    """The checksum is one of contents: neither addresses nor how they are aligned count."""
    memory = torch.zeros(4096 + 8, dtype=torch.uint8)
    values = torch.arange(4096).to(torch.uint8)
    found = set()
    for offset in range(8):
        memory[offset : offset + 4096] = values
        found.update(Snapshot([memory[offset : offset + 4096]])._read())
    assert len(found) == 1


def test_modules_and_tensors_are_those_of_pytorch() -> None:
    prior = snail(num_classes=3, condition_shapes=((3, 2),), condition_num_codes=(4,))
    modules, tensors = contents_of(prior)
    assert modules[0] is prior
    assert set(map(id, modules)) == set(map(id, prior.modules()))
    wanted = {id(tensor) for tensor in (*prior.parameters(), *prior.buffers())}
    assert set(map(id, tensors)) == wanted


def add_to_last(tensor: Tensor) -> None:
    tensor.data.view(-1)[-1] += 1


def numpy_middle(tensor: Tensor) -> None:
    values = tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy().reshape(-1)
    values[len(values) // 2] += 1


def swap_ends(tensor: Tensor) -> None:
    flat = tensor.data.view(-1)
    first, last = flat[0].clone(), flat[-1].clone()
    # All of them must differ, or a swap changes nothing.
    flat[0], flat[-1] = last + (first == last), first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", [add_to_last, numpy_middle, swap_ends])
@pytest.mark.parametrize("make", [snail, pixelcnn])
def test_plans_follow_an_edit_of_any_tensor(
    make: Callable[[], Prior], edit: Callable[[Tensor], None], dtype: torch.dtype
) -> None:
    prior = make().to(dtype)
    plan = plan_of(prior)
    for name, tensor in (*prior.named_parameters(), *prior.named_buffers()):
        assert plan_of(prior) is plan, name
        edit(tensor)
        before, plan = plan, plan_of(prior)
        assert plan is not before, name


@pytest.mark.parametrize("engine", CACHED)
@pytest.mark.parametrize("through", ["data", "numpy", "inference"])
def test_a_code_is_forced_through_its_bias(engine: str, through: str) -> None:
    with torch.inference_mode(through == "inference"):
        prior = snail(num_codes=40)
    first = sample(prior, 3, seed=1, engine=engine)
    assert not (first == 37).all()
    bias = prior.output.bias
    assert bias is not None
    if through == "data":
        bias.data[37] += 100
    elif through == "numpy":
        bias.detach().numpy()[37] += 100
    else:
        with torch.inference_mode():
            bias[37] += 100
    assert (sample(prior, 3, seed=1, engine=engine) == 37).all()


@pytest.mark.parametrize("engine", CACHED)
def test_channels_last_weights(engine: str) -> None:
    prior = spread(pixelcnn().to(memory_format=torch.channels_last))
    before = sample(prior, 30, seed=1, engine=engine)
    kernels = [parameter for parameter in prior.parameters() if parameter.ndim == 4 and not parameter.is_contiguous()]
    assert kernels
    for kernel in kernels:
        kernel.data[-1, -1, 0, 0] += 3
    after = sample(prior, 30, seed=1, engine=engine)
    assert torch.equal(after, sample(copy.deepcopy(prior), 30, seed=1, engine=engine))
    assert not torch.equal(after, before)


def test_a_change_while_a_plan_is_made_is_noticed_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = snail()
    compile_plan = prepared.compile_plan

    def interrupted(prior: Prior) -> object:
        plan = compile_plan(prior)
        prior.get_parameter("output.bias").data[-1] += 1
        return plan

    monkeypatch.setattr(prepared, "compile_plan", interrupted)
    stale = plan_of(prior)
    monkeypatch.undo()
    assert plan_of(prior) is not stale


def test_the_memory_of_a_snapshot_stays_its_own() -> None:
    """Memory given back would be given to the next tensor of the same size."""
    weight = nn.Parameter(torch.zeros(1000))
    snapshot = Snapshot([weight])
    for _ in range(5):
        address = weight.data_ptr()
        weight.data = torch.zeros(1000)
        assert weight.data_ptr() != address
    assert not snapshot.matches([weight])


def test_without_the_extension_the_checksum_is_of_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "available", lambda: False)
    tensors = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)]
    assert Snapshot(tensors)._read() == [0x55BC801D]
