"""The CUDA engine under many schedules of its threads, and without each of the places at which they meet."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import time
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from emulation_helpers import Emulated, emulated, emulated_module, reset, sites  # noqa: F401
from engine_helpers import engine_logits, needs_extension, request_of, spread
from helpers import pixelcnn, random_codes, snail
from torch import Tensor

from fastvq.models import Prior
from fastvq.sampling.plan import Op, Plan, Term, schedule
from fastvq.sampling.request import SampleRequest, Settings

pytestmark = [pytest.mark.usefixtures("steady"), needs_extension]


class Case:
    """A prior, a request for a few codes, and what comes of it under the first schedule."""

    def __init__(
        self,
        module: ModuleType,
        prior: Prior,
        batch: int,
        chosen: Settings,
        *,
        blocks: int = 3,
        precision: str = "float32",
        plan: Plan | None = None,
    ) -> None:
        shape = prior.config.shape
        known = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(1)) < 0.2
        init = random_codes(batch, *shape, num_codes=prior.config.num_codes)
        self.device = Emulated(module, spread(prior), batch, blocks=blocks, precision=precision, plan=plan)
        self.request: SampleRequest = request_of(prior, batch, {}, seed=3, init_codes=init, mask=known, settings=chosen)
        reset(module, seed=0)
        self.wanted = self.run()
        assert self.wanted[1].isfinite().all()

    def run(self) -> tuple[Tensor, Tensor]:
        return self.device.fill(self.request, logits=True)

    def is_right(self) -> bool:
        """Sums are in a fixed order, so that not one bit may differ."""
        return all(torch.equal(found, wanted) for found, wanted in zip(self.run(), self.wanted, strict=True))


PLAIN, FILTERED = Settings(), Settings(temperature=1.5, top_k=4, top_p=0.8)


def for_rows_below(shape: tuple[int, int], num_codes: int) -> Plan:
    """A plan of which one product is read by the row below alone, so that columns to come do not wait for it."""
    generator = torch.Generator().manual_seed(2)

    def weights(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator) / sizes[-2] ** 0.5

    def affine(index: int, source: int, tap: tuple[int, int], channels: tuple[int, int]) -> Op:
        term = Term(source, (tap,), weights(1, *channels))
        return Op(index, "affine", channels[1], terms=(term,), bias=torch.zeros(channels[1]))

    ops = [
        Op(0, "lookup", 16, taps=((0, -1),), weight=weights(1, num_codes, 16), bias=weights(1, 16)[0]),
        Op(1, "activation", 16, (0,), "elu"),
        affine(2, 1, (0, 0), (16, num_codes)),
        affine(3, 1, (0, 0), (16, 40)),
        affine(4, 3, (-1, 0), (40, num_codes)),
        Op(5, "add", num_codes, (2, 4)),
    ]
    return schedule(ops, 5, shape, num_codes)


CASES: dict[str, Callable[[ModuleType], Case]] = {
    "strict": lambda m: Case(m, snail(shape=(2, 3), attention_channels=2), 2, FILTERED),
    "inclusive": lambda m: Case(m, snail(shape=(2, 3), mask="inclusive", attention=False), 2, PLAIN, blocks=5),
    "pixelcnn": lambda m: Case(m, pixelcnn(shape=(2, 3)), 3, PLAIN, blocks=2),
    "bfloat16": lambda m: Case(m, snail(shape=(2, 2), attention=False), 8, FILTERED, precision="bfloat16"),
}


@pytest.mark.parametrize("kind", CASES)
def test_schedules(emulated: ModuleType, kind: str, record_property: Callable[[str, object], None]) -> None:
    """A thousand in all, of every policy, with and without stores that only loads of shared state see."""
    case = CASES[kind](emulated)
    started = time.perf_counter()
    for seed in range(250):
        reset(emulated, seed=seed, hide_stores=bool(seed // 8 % 2), switch_every=(0, 3, 20, 100)[seed % 4])
        assert case.is_right(), f"seed {seed}"
    record_property("seconds", time.perf_counter() - started)


# Large enough for every loop to go round more than once.
RICH: dict[str, Callable[[ModuleType], Case]] = {
    "attention": lambda m: Case(
        m, snail(shape=(2, 4), num_codes=70, channels=8, attention_channels=16), 4, FILTERED, blocks=2
    ),
    "wide": lambda m: Case(m, pixelcnn(shape=(2, 4), channels=40, num_codes=70), 9, PLAIN, blocks=2),
    "rows-below": lambda m: Case(m, snail(shape=(2, 8)), 1, PLAIN, blocks=5, plan=for_rows_below((2, 8), 5)),
    "bfloat16": lambda m: Case(
        m, snail(shape=(1, 4), mask="inclusive", channels=40, attention=False), 9, PLAIN, precision="bfloat16"
    ),
    # More samples than an instruction works on at a time.
    "samples": lambda m: Case(m, pixelcnn(shape=(1, 2), layers=1), 66, PLAIN, blocks=2),
}


def test_a_plan_with_work_for_rows_below(rich: list[Case]) -> None:
    device = rich[list(RICH).index("rows-below")].device
    codes = random_codes(1, 2, 8)
    wanted = engine_logits("cpu", device.prior, codes, {}, plan=device.compiled.plan)
    torch.testing.assert_close(device.logits(codes, {}), wanted, rtol=0, atol=1e-5)


NOTHING, WRONG, ERROR = 20, 21, 22


def what_happens(module: ModuleType, cases: list[Case], site: str) -> int:
    for seed in range(5 * module.POLICIES):
        for case in cases:
            reset(module, seed=seed, disabled=[site], switch_every=20)
            try:
                if not case.is_right():
                    return WRONG
            except Exception:
                return ERROR
    return NOTHING


def in_a_child(work: Callable[[], int]) -> int:
    """What a copy of this process exits with: whatever goes wild there does no harm. Minus a signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(120)
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def rich(emulated_module: ModuleType) -> list[Case]:
    return [make(emulated_module) for make in RICH.values()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be copied")
@pytest.mark.parametrize("site", sites())
def test_no_site_can_be_left_out(
    emulated: ModuleType, rich: list[Case], site: str, record_property: Callable[[str, object], None]
) -> None:
    """Without it codes or logits are wrong under some schedule, threads wait forever, or memory is misused."""
    outcome = in_a_child(lambda: what_happens(emulated, rich, site))
    record_property("outcome", outcome)
    assert outcome in (WRONG, ERROR, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGALRM), outcome


def test_every_site_is_passed(emulated: ModuleType, rich: list[Case]) -> None:
    emulated.reset_passed_sites()
    assert all(case.is_right() for case in rich)
    passed = emulated.passed_sites()
    assert [name for number, name in enumerate(sites()) if passed[number] == 0] == []
