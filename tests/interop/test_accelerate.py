"""What `fastvq.accelerate` replaces, what it leaves and says, and what stays as it is."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import foreign_quantizers as written
import pytest
import torch
import torch.distributed as dist
from accelerate_cases import RVQ, VQ, WRITTEN, package
from helpers import refuses
from torch import Tensor, nn

import fastvq
from fastvq.errors import AccelerationWarning, ArgumentTypeError
from fastvq.interop.quantizers import Acceleration, Known
from fastvq.interop.quantizers.kind import Accelerated

pytestmark = pytest.mark.usefixtures("steady")


def quantize(**changes: Any) -> written.Quantize:
    torch.manual_seed(0)
    return written.Quantize(8, 24, **changes)


def rows(seed: int = 0, *, grad: bool = True) -> Tensor:
    return torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


class Model(nn.Module):
    """Quantisers at several depths, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(8, 8)
        self.quantizers = nn.ModuleList([quantize(), nn.Sequential(quantize())])
        self.again = self.quantizers[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for quantizer in (self.quantizers[0], self.quantizers[1][0], self.again):
            x = quantizer(x)[0]
        return x


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Accelerated)]


def test_it_is_the_same_object_with_the_same_tensors() -> None:
    model = Model()
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    assert fastvq.accelerate(model) is model
    after = model.state_dict(keep_vars=True)
    assert [*after] == [*before]
    assert all(id(after[name]) == where and torch.equal(after[name], value) for name, (where, value) in before.items())
    assert replaced(model) == ["quantizers.0", "quantizers.1.0"]
    assert all(isinstance(model.get_submodule(name), written.Quantize) for name in replaced(model))
    assert type(model.again).__name__ == "Quantize"
    assert "AcceleratedQuantize" in repr(model)


def test_again_changes_nothing() -> None:
    model = fastvq.accelerate(Model())
    types = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastvq.accelerate(model)
    assert [type(module) for module in model.modules()] == types


def test_restoring_gives_the_class_and_what_it_learnt() -> None:
    model, other = Model(), Model()
    fastvq.accelerate(model)
    for seed in range(3):
        torch.testing.assert_close(model(rows(seed)), other(rows(seed)))
    assert fastvq.restore(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in other.modules()]
    assert "Accelerated" not in repr(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()))
    fastvq.restore(model)
    torch.testing.assert_close(model(rows(9)), other(rows(9)))


def test_a_quantizer_itself_is_accelerated() -> None:
    module = quantize()
    assert fastvq.accelerate(module) is module
    assert isinstance(module, Accelerated)
    assert fastvq.acceleration(module) == Acceleration((Known("", "VQ-VAE-2 port Quantize", True, None),))
    assert type(fastvq.restore(module)) is written.Quantize


def test_nothing_is_disturbed() -> None:
    model = nn.Sequential(quantize(), written.EuclideanCodebook(8, 24))
    model[1].eval()
    model[0].embed.grad = torch.ones(8, 24)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    random = torch.get_rng_state()
    with torch.no_grad():
        fastvq.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(model[0].embed.grad, torch.ones(8, 24))


def test_hooks_stay_and_are_not_called_for_the_trial() -> None:
    seen: list[str] = []
    module = quantize()
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    fastvq.accelerate(module)
    assert seen == []
    module(rows())
    assert seen == ["before", "after"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_make() -> None:
    """The weight is a result with a graph, which cannot be copied, and is made anew before each pass."""
    module, other = (written.VectorQuantize(8, 24, 6) for _ in range(2))
    for one in (module, other):
        one.in_proj = nn.utils.weight_norm(nn.Conv1d(8, 6, 1))
        one.out_proj = nn.utils.weight_norm(nn.Conv1d(6, 8, 1))
    with pytest.raises(RuntimeError):
        copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    assert isinstance(fastvq.accelerate(module), Accelerated)
    x = WRITTEN["DAC"].input(0)
    for actual, expected in zip(module(x), other(x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("save", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["port", "VQGAN"])
def test_copies_are_accelerated_too(save: str, name: str) -> None:
    model = fastvq.accelerate(nn.Sequential(WRITTEN[name].make()))
    if save == "deepcopy":
        other = copy.deepcopy(model)
    elif save == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other[0]) is type(model[0])
    x = WRITTEN[name].input(0)
    torch.testing.assert_close(other(x), model(x))
    assert other[0] is not model[0]
    assert type(fastvq.restore(other)[0]) is getattr(written, type(model[0]).__name__)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_compiled_models(before: bool) -> None:
    torch._dynamo.reset()
    plain, model = Model(), Model()
    if before:
        fastvq.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    if not before:
        plain(rows(7))
        compiled(rows(7))
        fastvq.accelerate(compiled)
    for seed in range(2):
        x, y = rows(seed), rows(seed)
        out, expected = compiled(x), plain(y)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))


def test_models_in_wrappers() -> None:
    for wrapped in (nn.DataParallel(Model()), torch.optim.swa_utils.AveragedModel(Model())):
        assert len(replaced(fastvq.accelerate(wrapped))) == 2


def test_exported_programs_hold_no_operations_of_ours() -> None:
    module = fastvq.accelerate(quantize().eval())
    exported = torch.export.export(module, (rows(grad=False),))
    assert "fastvq" not in str(exported.graph)
    traced = torch.jit.trace(module, rows(grad=False))
    assert "fastvq" not in str(traced.graph)
    torch.testing.assert_close(traced(rows(1))[0], module(rows(1))[0])


def test_the_table_and_the_warning_say_what_was_left() -> None:
    model = nn.ModuleDict({"used": quantize(), "left": written.VectorQuantizer(24, 8, 0.25), "other": nn.Linear(2, 2)})
    assert fastvq.acceleration(model).quantizers[0].state == "not accelerated"
    with pytest.warns(AccelerationWarning, match="^accelerate: left as they are: left [(]taming.*one-hot row") as seen:
        fastvq.accelerate(model)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    used, left = fastvq.acceleration(model).quantizers
    assert (used.name, used.accelerated, used.reason) == ("used", True, None)
    assert (left.name, left.accelerated) == ("left", False)
    lines = str(fastvq.acceleration(model)).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "used", "left"]
    assert lines[1].endswith("accelerated")


def test_a_model_without_a_known_quantizer() -> None:
    with pytest.warns(AccelerationWarning, match="^accelerate: no quantiser of a known kind was found in Sequential$"):
        fastvq.accelerate(nn.Sequential(nn.Linear(2, 2)))
    assert str(fastvq.acceleration(nn.Linear(2, 2))) == "no quantiser of a known kind"


@pytest.mark.parametrize("function", [fastvq.accelerate, fastvq.restore, fastvq.acceleration])
def test_what_is_no_module_is_refused(function: Callable[[Any], Any]) -> None:
    with refuses(ArgumentTypeError, "model: expected a torch.nn.Module, got dict"):
        function({"model": quantize()})
    with refuses(ArgumentTypeError, "model: expected a torch.nn.Module, got type"):
        function(written.Quantize)


def left(module: nn.Module) -> str:
    """Why a module is left as it is, which has to be so."""
    cls, state = type(module), copy.deepcopy(module.state_dict())
    with pytest.warns(AccelerationWarning) as seen:
        fastvq.accelerate(module)
    assert type(module) is cls
    # One of its buffers is memory as it was found, which may read as no number.
    torch.testing.assert_close(dict(module.state_dict()), dict(state), equal_nan=True)
    (known,) = [known for known in fastvq.acceleration(module).quantizers if known.name == ""]
    assert known.reason is not None
    assert known.reason in str(seen[0].message)
    return known.reason


class Louder(written.Quantize):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, diff, index = super().forward(input)
        return out, 2 * diff, index


class Longer(written.Quantize):
    def usage(self) -> Tensor:
        return (self.cluster_size > 0).float().mean()


def test_subclasses() -> None:
    assert left(Louder(8, 24)) == "its class Louder changes forward"
    longer = Longer(8, 24)
    fastvq.accelerate(longer)
    assert isinstance(longer, Accelerated)
    assert longer.usage() == 0
    assert type(fastvq.restore(longer)) is Longer


def test_methods_of_one_module() -> None:
    module = quantize()
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert left(module) == "it has a forward of its own"


def changed(**methods: Callable[..., Any]) -> nn.Module:
    """A module of the known name, in whose file something was changed."""
    cls = type("Quantize", (nn.Module,), {**vars(written.Quantize), **methods})
    module = quantize()
    module.__class__ = cls
    return module


def doubled(self: Any, input: Tensor) -> Any:
    out, diff, index = written.Quantize.forward(self, input)
    return out, 2 * diff, index


def louder_gradient(self: Any, input: Tensor) -> Any:
    out, diff, index = written.Quantize.forward(self, input)
    return out + (input - input.detach()), diff, index


def slower(self: Any, input: Tensor) -> Any:
    found = written.Quantize.forward(self, input)
    if self.training:
        self.cluster_size.mul_(0.9)
    return found


def only_when_evaluated(self: Any, input: Tensor) -> Any:
    out, diff, index = written.Quantize.forward(self, input)
    return out, diff, index if self.training else index + 1


def longer_output(self: Any, input: Tensor) -> Any:
    return (*written.Quantize.forward(self, input), None)


def broken(self: Any, input: Tensor) -> Any:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (doubled, "its output 1 would differ in training"),
        (louder_gradient, "its gradient of input 0 would differ in training"),
        (slower, "its cluster_size after a step would differ in training"),
        (only_when_evaluated, "its output 2 would differ in evaluation"),
        (longer_output, "its kind of output would differ in training"),
        (broken, "it cannot be tried: KeyError: 'no such thing'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_that_were_changed_are_found_out(forward: Callable[..., Any], reason: str) -> None:
    def with_names(self: Any, input: Tensor) -> Any:
        return forward(self, input)

    assert left(changed(forward=with_names)) == reason


@pytest.mark.parametrize("name", ["gumbel_sample", "embed"])
def test_another_version_without_an_attribute(name: str) -> None:
    module = VQ["plain"].make()
    delattr(module._codebook, name)
    assert left(module) == f"it is of another version: 'Codebook' object has no attribute '{name}'"


def test_codes_of_half_precision() -> None:
    assert left(quantize().bfloat16()) == "its codes are torch.bfloat16, not torch.float32"
    module, other = fastvq.accelerate(quantize()).double(), quantize().double()
    x = rows(grad=False).double()
    for actual, expected in zip(module(x), other(x), strict=True):
        assert torch.equal(actual, expected)


def test_what_cannot_be_computed_with_is_left_to_the_original() -> None:
    module, other = fastvq.accelerate(quantize().eval()), quantize().eval()
    x = rows(grad=False)
    mapped = torch.vmap(lambda one: module(one)[0])(x)
    torch.testing.assert_close(mapped, torch.vmap(lambda one: other(one)[0])(x))
    with pytest.raises(RuntimeError), torch.no_grad():
        other(torch.zeros(2, 7))
    empty = torch.zeros(0, 8)
    assert module(empty)[2].shape == (0,)


def test_bfloat16_activations_keep_averages_exact() -> None:
    module = fastvq.accelerate(quantize())
    x = rows(grad=False).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, diff, _ = module(x)
    (out.float().sum() + diff.float()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    other = fastvq.accelerate(quantize())
    other(x.detach().float())
    torch.testing.assert_close(module.embed_avg, other.embed_avg)


def test_processes_share_what_the_original_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same vectors, and none of them is waited for by the trial."""
    reduced: list[tuple[int, ...]] = []

    def all_reduce(value: Tensor, *args: Any) -> None:
        reduced.append(tuple(value.shape))
        value.mul_(2)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    theirs, ours = quantize(), fastvq.accelerate(quantize())
    assert isinstance(ours, Accelerated)
    assert reduced == []
    theirs(rows())
    assert len(reduced) == 2
    ours(rows())
    assert len(reduced) == 4
    torch.testing.assert_close(dict(theirs.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize("residual", [False, True], ids=["VectorQuantize", "ResidualVQ"])
def test_codebooks_that_processes_share(residual: bool) -> None:
    """Two processes with the same vectors: what is added up is twice as much."""
    package("vector_quantize_pytorch")
    cases = RVQ if residual else VQ
    theirs, ours = cases["plain"].pair(lambda module: module)
    reduced: list[tuple[int, ...]] = []

    def all_reduce(value: Tensor) -> None:
        reduced.append(tuple(value.shape))
        value.mul_(2)

    for module in (theirs, ours):
        for level in module.layers if residual else [module]:
            level._codebook.use_ddp, level._codebook.all_reduce_fn = True, all_reduce
    fastvq.accelerate(ours)
    assert isinstance(ours, Accelerated)
    assert reduced == []
    x = cases["plain"].input(0)
    theirs(x)
    expected = [*reduced]
    reduced.clear()
    ours(x)
    assert reduced == expected != []
    torch.testing.assert_close(dict(theirs.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss"),
        ({"codebook_diversity_loss_weight": 0.1}, "codebook_diversity_loss_weight"),
        ({"orthogonal_reg_weight": 1.0}, "orthogonal_reg_weight"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes"),
        ({"straight_through": True, "rotation_trick": False}, "straight_through"),
        ({"affine_param": True}, "affine_param"),
        ({"directional_reparam": True, "threshold_ema_dead_code": 1}, "directional_reparam"),
        ({"vq_bridge": nn.Identity()}, "vq_bridge"),
        (
            {
                "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1),
                "learnable_codebook": True,
                "ema_update": False,
            },
            "in_place_codebook_optimizer",
        ),
        ({"sync_update_v": 0.1, "learnable_codebook": True, "ema_update": False}, "sync_update_v"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_are_left_alone(options: dict[str, Any], reason: str) -> None:
    assert left(package("vector_quantize_pytorch").VectorQuantize(8, 24, **options)) == reason


@pytest.mark.filterwarnings("ignore::fastvq.errors.AccelerationWarning")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shared_codebook": True}, "shared_codebook"),
        ({"implicit_neural_codebook": True}, "implicit_neural_codebook"),
        ({"diveq": True}, "diveq"),
        ({"beam_size": 2}, "beam_size=2"),
        ({"quant_grad_frac": 0.5}, "quant_grad_frac=0.5"),
        ({"codebook_size": (24, 16, 8)}, "codebook_size=(24, 16, 8): levels differ"),
        ({"use_cosine_sim": True}, "use_cosine_sim"),
        ({"affine_param": True}, "affine_param"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_residual_options_that_are_left_alone(options: dict[str, Any], reason: str) -> None:
    options = {"dim": 8, "num_quantizers": 3, "codebook_size": 24, **options}
    assert left(package("vector_quantize_pytorch").ResidualVQ(**options)) == reason


@pytest.mark.parametrize(
    "call",
    [
        {"topk": 2},
        {"indices": torch.zeros(4, 40, dtype=torch.int64)},
        {"return_loss_breakdown": True},
        {"ema_update": False},
        {"accum_ema_update": True},
        {"freeze_codebook": True},
        {"sample_codebook_temp": 0.5},
    ],
    ids=lambda call: next(iter(call)),
)
def test_calls_that_ask_for_more(call: dict[str, Any]) -> None:
    theirs, ours = VQ["plain"].pair(fastvq.accelerate)
    for seed in range(3):
        x = VQ["plain"].input(seed).requires_grad_()
        torch.testing.assert_close([*ours(x, **call)], [*theirs(x, **call)])
        torch.testing.assert_close([*ours(x)], [*theirs(x)])
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("of", ["mask", "lens"])
@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("plain", True),
        ("straight through", True),
        ("cosine", True),
        ("cosine, dead codes", True),
        ("k-means, dead codes", True),
        ("learnable", True),
        ("channels first", True),
        ("heads", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "input"])
def test_padding_is_left_out(name: str, fast: bool, of: str, zeros: bool) -> None:
    pair = VQ[name].pair(fastvq.accelerate)
    lens = torch.tensor([40, 3, 20, 1])
    # With channels first the original takes their number for that of vectors.
    by_length = of == "lens" and name != "channels first"
    call = {"lens": lens} if by_length else {"mask": torch.arange(40) < lens[:, None]}
    if name == "heads":
        # The original's loss is of the wrong shape.
        pair = [module.eval() for module in pair]
    for seed in range(3):
        results = []
        for module in pair:
            module.return_zeros_for_masked_padding = zeros
            torch.manual_seed(seed)
            x = VQ[name].input(seed).requires_grad_()
            out, codes, loss = module(x, **call)
            if module.training:
                (out.square().sum() + loss).backward()
            results.append([out, codes, loss, x.grad])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(pair[1].state_dict()), dict(pair[0].state_dict()))
    x = VQ[name].input(0)
    with Calls(type(pair[0])) as originals:
        pair[1](x, **call)
    assert originals.count == (not fast)


class Calls:
    """How often the forward pass of a class is called."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls, self.forward, self.count = cls, cls.forward, 0

    def __enter__(self) -> Calls:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.forward(*args, **kwargs)

        self.cls.forward = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self.cls.forward = self.forward  # type: ignore[method-assign]


@pytest.mark.parametrize("call", [{"return_all_codes": True}, {"freeze_codebook": True}, {"beam_size": 2}], ids=str)
def test_residual_calls_that_ask_for_more(call: dict[str, Any]) -> None:
    theirs, ours = RVQ["straight through"].pair(fastvq.accelerate)
    for seed in range(3):
        x = RVQ["straight through"].input(seed).requires_grad_()
        torch.testing.assert_close([*ours(x, **call)], [*theirs(x, **call)])
        torch.testing.assert_close([*ours(x)], [*theirs(x)])
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_hooks_and_options_that_come_later_are_heeded() -> None:
    ours = RVQ["plain"].pair(fastvq.accelerate)[1]
    seen: list[int] = []
    ours.layers[1].register_forward_hook(lambda *_: seen.append(1))
    ours.layers[2]._codebook.register_forward_hook(lambda *_: seen.append(2))
    ours(RVQ["plain"].input(0))
    assert seen == [1, 2]
    one = VQ["plain"].pair(fastvq.accelerate)[1]
    one.has_codebook_diversity_loss, one.codebook_diversity_loss_weight = True, 1.0
    x = VQ["plain"].input(0)
    expected = fastvq.restore(copy.deepcopy(one))(x)[2]
    torch.testing.assert_close(one(x)[2], expected)
