"""The emulated device itself: right kernels run right under every schedule, and what is wrong with others shows."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from emulation_helpers import emulated, emulated_module, sites  # noqa: F401
from numpy.typing import NDArray

# Places where the threads of tests/emulation/toys.cpp meet.
WRITTEN, READ, FLAG, RAISE = range(4)
Floats = NDArray[np.float32]


def choose(module: ModuleType, **chosen: Any) -> None:
    module.configure(**chosen)


def ring(module: ModuleType, rounds: int = 3) -> Floats:
    threads = module.TOY_THREADS
    values = np.arange(2 * threads, dtype=np.float32)
    found = module.run_toy("ring", blocks=2, rounds=rounds, shared_bytes=4 * threads, values=values, size=2 * threads)
    return np.array(found, dtype=np.float32)


def chain(module: ModuleType, blocks: int = 3, rounds: int = 3) -> Floats:
    threads = module.TOY_THREADS
    size = blocks * rounds * threads
    found = module.run_toy("chain", blocks=blocks, rounds=rounds, values=np.arange(threads), size=size)
    return np.array(found, dtype=np.float32).reshape(blocks, rounds, threads)


def wanted_ring(module: ModuleType, rounds: int = 3) -> Floats:
    return np.concatenate([np.roll(part, -rounds) for part in np.split(np.arange(2.0 * module.TOY_THREADS), 2)])


def wanted_chain(module: ModuleType, blocks: int = 3, rounds: int = 3) -> Floats:
    return np.broadcast_to(
        np.arange(module.TOY_THREADS) + np.arange(1.0, blocks + 1)[:, None, None], (blocks, rounds, module.TOY_THREADS)
    )


@pytest.mark.parametrize("hide_stores", [False, True], ids=["plain", "hidden"])
@pytest.mark.parametrize("policy", range(8))
def test_right_kernels(emulated: ModuleType, policy: int, hide_stores: bool) -> None:
    assert policy < emulated.POLICIES == 8
    for seed in range(policy, 10 * emulated.POLICIES, emulated.POLICIES):
        choose(emulated, seed=seed, hide_stores=hide_stores)
        np.testing.assert_array_equal(ring(emulated), wanted_ring(emulated))
        np.testing.assert_array_equal(chain(emulated), wanted_chain(emulated))


@pytest.mark.parametrize("site", [WRITTEN, READ], ids=["written", "read"])
def test_a_missing_barrier_shows(emulated: ModuleType, site: int) -> None:
    found = []
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed, disabled={site})
        found.append(not np.array_equal(ring(emulated), wanted_ring(emulated)))
    assert sum(found) >= emulated.POLICIES // 2


@pytest.mark.parametrize("site", [WRITTEN, READ, FLAG], ids=["written", "read", "flag"])
def test_a_missing_link_between_blocks_shows(emulated: ModuleType, site: int) -> None:
    found = []
    for seed in range(5 * emulated.POLICIES):
        choose(emulated, seed=seed, disabled={site})
        found.append(not np.array_equal(chain(emulated), wanted_chain(emulated)))
    assert sum(found) >= 5


def test_a_missing_signal_is_a_deadlock(emulated: ModuleType) -> None:
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed, disabled={RAISE}, site_names=["a", "b", "the flag"])
        with pytest.raises(RuntimeError, match=r"deadlock.*1 thread waiting at the flag for 1, counted 0") as caught:
            chain(emulated)
        text = str(caught.value)
        assert "63 threads at the barrier b" in text
        assert "block 0: 64 threads through" in text


def test_a_deadlock_names_every_block(emulated: ModuleType) -> None:
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed)
        with pytest.raises(RuntimeError, match=r"deadlock.*block 0: .*block 1: .*site 2"):
            emulated.run_toy("deadlock", blocks=2)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("split", r"threads of one block meet at different places: thread \d+ of block 0 at the barrier site \d"),
        ("leave", r"leaves the kernel while others wait at the barrier site 0|another of its block has left"),
    ],
)
def test_misused_barriers(emulated: ModuleType, kernel: str, message: str) -> None:
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed)
        with pytest.raises(RuntimeError, match=message):
            emulated.run_toy(kernel)
    np.testing.assert_array_equal(ring(emulated), wanted_ring(emulated))  # what failed leaves nothing behind


def test_running_in_circles_ends(emulated: ModuleType) -> None:
    choose(emulated, most_switches=1000)
    with pytest.raises(RuntimeError, match="no end after many switches: block 0"):
        ring(emulated, rounds=100)


def test_a_seed_is_a_schedule(emulated: ModuleType) -> None:
    def switches(seed: int) -> list[int]:
        choose(emulated, seed=seed, switch_every=5)
        counts = []
        for _ in range(3):
            chain(emulated)
            counts.append(emulated.last_switches())
        return counts

    every = [switches(seed) for seed in range(0, 80, 8)]
    assert every == [switches(seed) for seed in range(0, 80, 8)]
    assert len({tuple(counts) for counts in every}) > 5
    assert len(set(every[0])) > 1  # nor are two launches alike


def test_sites_are_counted(emulated: ModuleType) -> None:
    emulated.reset_passed_sites()
    chain(emulated, blocks=4, rounds=5)
    assert emulated.passed_sites()[:5] == [4 * 5 * 64, 3 * 5 * 64, 3 * 5, 4 * 5, 0]


def test_plain_loads_do_not_see_hidden_stores(emulated: ModuleType) -> None:
    """What is stored as shared state while a kernel runs may be missing in another block's first-level cache."""
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed, hide_stores=True)
        assert emulated.run_toy("handed", blocks=2, rounds=1, size=2) == [1.0, 1.0]
        stale = emulated.run_toy("handed", blocks=2, rounds=0, size=2)
        assert stale[0] == 1.0
        assert np.isnan(stale[1])


def test_matrix_instruction(emulated: ModuleType) -> None:
    """Two warps, against float32 sums of bfloat16 products in ascending depth, the order of the emulation."""
    generator = np.random.default_rng(0)

    def rounded(*shape: int) -> Floats:
        bits = generator.standard_normal(shape).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)

    a, b = rounded(2, 16, 16), rounded(2, 16, 8)
    start = generator.standard_normal((2, 16, 8)).astype(np.float32)
    wanted = start.copy()
    for k in range(16):
        wanted += a[:, :, k, None] * b[:, k, None]
    lane = np.arange(32)
    packed = np.zeros((2, 32, 10), dtype=np.uint32)

    def pair(low: Floats, high: Floats) -> NDArray[np.uint32]:
        return (low.view(np.uint32) >> np.uint32(16)) | high.view(np.uint32)

    for i, (row, depth) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        rows, depths = lane // 4 + row, lane % 4 * 2 + depth
        packed[:, :, i] = pair(a[:, rows, depths], a[:, rows, depths + 1])
    for i, depth in enumerate((0, 8)):
        depths = lane % 4 * 2 + depth
        packed[:, :, 4 + i] = pair(b[:, depths, lane // 4], b[:, depths + 1, lane // 4])
    places = [(lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2) for i in range(4)]
    for i, (rows, columns) in enumerate(places):
        packed[:, :, 6 + i] = start[:, rows, columns].view(np.uint32)
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed)
        out = emulated.run_toy("matrix", fragments=packed.reshape(-1), size=2 * 32 * 4)
        found = np.full((2, 16, 8), np.nan, dtype=np.float32)
        for i, (rows, columns) in enumerate(places):
            found[:, rows, columns] = np.array(out, dtype=np.float32).reshape(2, 32, 4)[:, :, i]
        np.testing.assert_array_equal(found, wanted)


def test_shuffles(emulated: ModuleType) -> None:
    values = np.random.default_rng(1).integers(-1000, 1000, 64).astype(np.float32)
    wanted = np.repeat(values.reshape(2, 32).sum(1), 32)
    for seed in range(emulated.POLICIES):
        choose(emulated, seed=seed)
        found = np.array(emulated.run_toy("sums", values=values, size=128), dtype=np.float32)
        np.testing.assert_array_equal(found, np.concatenate([wanted, wanted]))


def test_shared_memory_is_poisoned_and_each_block_has_its_own(emulated: ModuleType) -> None:
    found = emulated.run_toy("shared", blocks=3, shared_bytes=64, size=48)
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("launch", "device", "error"),
    [
        ({"shared_bytes": 49_152}, {}, None),
        ({"shared_bytes": 49_153}, {}, "cudaErrorInvalidValue"),
        ({"blocks": 4}, {"multiprocessors": 2, "blocks_per_multiprocessor": 2}, None),
        ({"blocks": 5}, {"multiprocessors": 2, "blocks_per_multiprocessor": 2}, "cudaErrorCooperativeLaunchTooLarge"),
        ({"blocks": 0}, {}, "cudaErrorInvalidConfiguration"),
    ],
    ids=["largest-shared", "too-much-shared", "most-blocks", "too-many-blocks", "no-block"],
)
def test_launches_that_cannot_be(
    emulated: ModuleType, launch: dict[str, int], device: dict[str, int], error: str | None
) -> None:
    choose(emulated, **device)
    kernel = {"size": 64, "shared_bytes": 64, **launch}
    if error is None:
        assert len(emulated.run_toy("shared", **kernel)) == 64
    else:
        with pytest.raises(RuntimeError, match=f"^{error}$"):
            emulated.run_toy("shared", **kernel)


def test_sites_of_the_kernels_are_found() -> None:
    names = sites()
    assert names[0] == "kWaitSources"
    assert len(names) == len(set(names)) > 10
