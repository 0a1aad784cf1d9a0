"""How a codebook starts from data and moves with it, as registered operations that change its tensors in place.

As single operations they stay whole under `torch.compile`, whatever they decide by looking at data and whichever
processes they wait for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq.errors import ArgumentError, UnavailableError
from fastvq.models.repeated_pass import is_repetition, refuse_repetition
from fastvq.ops.ema_update.backends import BACKENDS
from fastvq.ops.ema_update.options import Options
from fastvq.ops.ema_update.triton import triton_ema_updates
from fastvq.ops.nearest_code import nearest_code_statistics

_KMEANS_VECTORS_PER_CODE = 256
# What random words are drawn from before they are taken modulo a number of vectors.
_WORDS = 2**62
# Shorter vectors have no direction worth keeping.
LEAST_LENGTH = 1e-6


def start_codebook(
    vectors: Tensor,
    mask: Tensor | None,
    embedding: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor | None,
    initialized: Tensor,
    init: str,
    kmeans_iters: int,
    cosine: bool,
    sync: bool | None,
) -> None:
    """Take the codes from ``vectors`` [G, M, D] where ``mask`` [G, M], unless ``initialized`` says it was done.

    The vectors of all processes count, in the order of the processes, and the first one draws: the codes are those that
    one process would take from all of the vectors. With ``init = kmeans`` Lloyd's iterations follow.
    """
    _refuse_repetition()
    # A recording cannot wait for the GPU to say; whoever makes one has run the pass before.
    if (initialized.is_cuda and torch.cuda.is_current_stream_capturing()) or bool(initialized):
        return
    table = embedding[None] if embedding.ndim == 2 else embedding
    started = []
    for group, part in enumerate(vectors):
        usable = part.isfinite().all(1) if mask is None else part.isfinite().all(1) & mask[group]
        if cosine:
            usable &= part.norm(dim=1) > LEAST_LENGTH
        rows = part[usable].to(torch.promote_types(table.dtype, torch.float32))
        first, total = (int(value) for value in _numbered(torch.tensor([len(rows)], device=rows.device), sync))
        # The same on every process, so that none is left waiting for another that has raised.
        if total == 0:
            raise ArgumentError("x: the first batch holds no finite vector to initialise the codebook from")
        chosen = _spread(total, table.shape[1], rows.device, sync) - first
        codes = _of_all(_picked(rows[None], chosen[None]), sync)[0]
        if init == "kmeans":
            subset = _spread(total, min(total, len(codes) * _KMEANS_VECTORS_PER_CODE), rows.device, sync) - first
            own = subset[(subset >= 0) & (subset < len(rows))]
            codes = lloyd(rows[own], codes, kmeans_iters, cosine, sync)
        started.append(codes)
    codebook = torch.stack(started).view(embedding.shape)
    embedding.copy_(codebook)
    if embedding_sum is not None:
        embedding_sum.copy_(codebook)
    cluster_size.fill_(1)
    initialized.fill_(1)


def lloyd(vectors: Tensor, codes: Tensor, iterations: int, cosine: bool = False, sync: bool | None = None) -> Tensor:
    """k-means from ``codes`` [K, D] on ``vectors`` [N, D] of all processes; an empty cluster keeps its centre."""
    for _ in range(iterations):
        found = nearest_code_statistics(vectors, codes)
        counts, sums = _over_processes(found.counts[None], found.sums.to(codes.dtype), sync)
        means = sums / counts[0, :, None].clamp(min=1)
        codes = _unit(means, codes) if cosine else torch.where(counts[0, :, None] > 0, means, codes)
    return codes


def move_codebook(
    counts: Tensor,
    sums: Tensor,
    vectors: Tensor,
    mask: Tensor | None,
    embedding: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor | None,
    decay: float,
    eps: float,
    revive_below: float,
    cosine: bool,
    sync: bool | None,
) -> Tensor:
    """One step of the averages by what L passes over the codebook found, then new places for dead codes.

    Args:
        counts: [L, G, K], of this process alone.
        sums: [G, K, D], likewise, added over the passes.
        vectors, mask: [G, M, D] and [G, M], where codes that are dead find their new places.
        embedding_sum: None for a codebook that gradients move; it then only follows the use of its codes.

    Returns:
        counts added over processes, as floating point.
    """
    _refuse_repetition()
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    totals = counts
    if _distributed(sync):
        totals, sums = _over_processes(counts, sums.to(dtype), sync)
    if embedding_sum is not None and revive_below <= 0 and not cosine:
        # What most training does, in one pass where there is a kernel for it.
        found, moved = totals[0] if len(totals) == 1 else totals.sum(0), sums
        if embedding.ndim == 2:
            found, moved = found.squeeze(0), sums.squeeze(0)
        given = found, moved, cluster_size, embedding_sum, embedding
        backend = BACKENDS.select(None, *given).name
        if backend != "torch":
            torch.ops.fastvq.ema_update(*given, decay, eps, True, backend)
            return totals.to(torch.float32)
    totals, sums = totals.to(dtype), sums.to(dtype)
    table = embedding[None] if embedding.ndim == 2 else embedding
    before = cluster_size[None] if cluster_size.ndim == 1 else cluster_size
    counts = totals.sum(0)
    usable = sums.isfinite().all(2).all(1) & (counts.sum(1) > 0)  # [G]
    size = torch.lerp(counts, before.to(dtype), decay)
    codes = table.to(dtype)
    total = codes
    if embedding_sum is not None:
        total = torch.lerp(sums, embedding_sum.to(dtype).view_as(codes), decay)
        if cosine:
            codes = _unit(total, codes)
        else:
            whole = size.sum(1, keepdim=True)
            codes = total / ((size + eps) / (whole + size.shape[1] * eps) * whole)[..., None]
    if revive_below > 0:
        fresh = _draw(vectors.to(dtype), mask, table.shape[1], sync)
        # A draw may be no place for a code; the code then waits for the next batch.
        fits = fresh.isfinite().all(2)
        if cosine:
            fits &= fresh.norm(dim=2) > LEAST_LENGTH
        dead = (size < revive_below) & fits
        # With less than the threshold a code would be dead again in the next step, whatever it gains there.
        begin = max(1.0, revive_below)
        size = torch.where(dead, begin, size)
        total = torch.where(dead[..., None], fresh * begin, total)
        codes = torch.where(dead[..., None], fresh, codes)
    cluster_size.copy_(torch.where(usable[:, None], size, before).view_as(cluster_size))
    if embedding_sum is not None:
        kept = embedding_sum.view_as(total)
        embedding_sum.copy_(torch.where(usable[:, None, None], total.to(kept.dtype), kept).view_as(embedding_sum))
    embedding.copy_(torch.where(usable[:, None, None], codes.to(table.dtype), table).view_as(embedding))
    return totals


def move_codebooks(
    counts: Tensor,
    sums: Tensor,
    embeddings: list[Tensor],
    cluster_sizes: list[Tensor],
    embedding_sums: list[Tensor],
    decay: float,
    eps: float,
    sync: bool | None,
) -> Tensor:
    """`move_codebook` of H codebooks of one size, which is to do nothing but average.

    Args:
        counts, sums: [H, K] and [H, K, D], of this process alone.

    Returns:
        counts added over processes, as floating point.
    """
    _refuse_repetition()
    dtype = torch.promote_types(embeddings[0].dtype, torch.float32)
    totals = counts
    if _distributed(sync):
        totals, sums = _over_processes(counts, sums.to(dtype), sync)
    moved = list(zip(cluster_sizes, embedding_sums, embeddings, strict=True))
    backends = {BACKENDS.select(None, totals, sums, *one).name for one in moved}
    options = Options(decay, eps, True, None)
    if backends == {"triton"} and all(tensor.data_ptr() % 16 == 0 for one in moved for tensor in one):
        triton_ema_updates(totals, sums, moved, options)
    else:
        for head, one in enumerate(moved):
            torch.ops.fastvq.ema_update(totals[head], sums[head], *one, *options)
    return totals.to(dtype)


def _refuse_repetition() -> None:
    """A compiled pass cannot look for its first run."""
    if is_repetition():
        refuse_repetition("compiled passes are not remembered")


def _unit(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Scaled to unit length; where there is no length, ``otherwise``."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / length, otherwise)


def _numbered(counts: Tensor, sync: bool | None) -> tuple[Tensor, Tensor]:
    """Where this process's items begin in a numbering process by process, and how many there are in all; of its own
    ``counts``, int64.
    """
    if not _distributed(sync):
        return torch.zeros_like(counts), counts
    every = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
    dist.all_gather(every, counts)
    return sum(every[: dist.get_rank()], torch.zeros_like(counts)), sum(every, torch.zeros_like(counts))


def _spread(available: int, wanted: int, device: torch.device, sync: bool | None) -> Tensor:
    """Random indices, each available one used before any is repeated; those of the first process."""
    rounds = [torch.randperm(available, device=device) for _ in range(-(-wanted // available))]
    return _from_first_process(torch.cat(rounds)[:wanted], sync)


def _draw(vectors: Tensor, mask: Tensor | None, wanted: int, sync: bool | None) -> Tensor:
    """Random ones of the vectors [G, M, D] of all processes where mask [G, M], which the first process chooses:
    [G, wanted, D], NaN if there are none.
    """
    groups, own = vectors.shape[:2]
    counts = torch.full((groups,), own, device=vectors.device) if mask is None else mask.sum(1)
    first, total = _numbered(counts, sync)
    # Of a fixed range, so that nobody waits for a GPU to say how many there are.
    words = torch.randint(_WORDS, (groups, wanted), device=vectors.device)
    index = _from_first_process(words, sync) % total.clamp(min=1)[:, None] - first[:, None]
    if mask is not None and own:
        # The n-th real vector is found by the running count.
        inside = (index >= 0) & (index < counts[:, None])
        index = torch.where(inside, torch.searchsorted(mask.cumsum(1), index + 1), -1)
    drawn = _of_all(_picked(vectors, index), sync)
    return torch.where(total[:, None, None] > 0, drawn, torch.nan)


def _picked(vectors: Tensor, index: Tensor) -> Tensor:
    """Vectors [G, M, D] of an index [G, k]: [G, k, D], 0 where it is none of them."""
    own, width = vectors.shape[1:]
    if own == 0:
        return vectors.new_zeros(*index.shape, width)
    found = torch.gather(vectors, 1, index.clamp(0, own - 1)[..., None].expand(-1, -1, width))
    return torch.where(((index >= 0) & (index < own))[..., None], found, 0)


def _distributed(sync: bool | None) -> bool:
    ready = dist.is_available() and dist.is_initialized()
    if sync and not ready:
        raise UnavailableError("sync_codebook: torch.distributed has no process group; call init_process_group first")
    return sync is not False and ready and dist.get_world_size() > 1


def _over_processes(counts: Tensor, sums: Tensor, sync: bool | None) -> tuple[Tensor, Tensor]:
    """Both added over processes, in the type of ``sums``; float32 holds counts exactly up to 2^24."""
    together = _of_all(torch.cat([counts.flatten().to(sums.dtype), sums.flatten()]), sync)
    return together[: counts.numel()].view_as(counts), together[counts.numel() :].view_as(sums)


def _of_all(value: Tensor, sync: bool | None) -> Tensor:
    """Added over processes."""
    if _distributed(sync):
        value = value.contiguous()
        dist.all_reduce(value)
    return value


def _from_first_process(value: Tensor, sync: bool | None) -> Tensor:
    if _distributed(sync):
        value = value.contiguous()
        dist.broadcast(value, src=0)
    return value


def snapshot(value: Tensor, moves: bool) -> Tensor:
    """A copy that a compiled backward pass does not make anew from what ``value`` has become by then; refused where a
    compiled checkpointed region would, if the pass ``moves`` the codebook.
    """
    if moves:
        _refuse_repetition()
    return value.clone(memory_format=torch.contiguous_format)


# nondeterministic_seeded: they draw random numbers.
_library = torch.library.Library("fastvq", "FRAGMENT")
_library.define(
    "start_codebook(Tensor vectors, Tensor? mask, Tensor(a!) embedding, Tensor(b!) cluster_size,"
    " Tensor(c!)? embedding_sum, Tensor(d!) initialized, str init, int kmeans_iters, bool cosine, bool? sync) -> ()",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define(
    "move_codebook(Tensor counts, Tensor sums, Tensor vectors, Tensor? mask, Tensor(a!) embedding,"
    " Tensor(b!) cluster_size, Tensor(c!)? embedding_sum, float decay, float eps, float revive_below, bool cosine,"
    " bool? sync) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define(
    "move_codebooks(Tensor counts, Tensor sums, Tensor(a!)[] embeddings, Tensor(b!)[] cluster_sizes,"
    " Tensor(c!)[] embedding_sums, float decay, float eps, bool? sync) -> Tensor"
)
_library.define("snapshot(Tensor value, bool moves) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("start_codebook", start_codebook, _device)
    _library.impl("move_codebook", move_codebook, _device)
    _library.impl("move_codebooks", move_codebooks, _device)
    _library.impl("snapshot", snapshot, _device)


@torch.library.register_fake("fastvq::start_codebook", lib=_library)
def _(*args: object) -> None:
    return None


@torch.library.register_fake("fastvq::move_codebook", lib=_library)
def _(counts: Tensor, sums: Tensor, vectors: Tensor, mask: Tensor | None, embedding: Tensor, *args: object) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.promote_types(embedding.dtype, torch.float32))


@torch.library.register_fake("fastvq::move_codebooks", lib=_library)
def _(counts: Tensor, sums: Tensor, embeddings: list[Tensor], *args: object) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.promote_types(embeddings[0].dtype, torch.float32))


@torch.library.register_vmap("fastvq::snapshot", lib=_library)
def _(info: object, axes: tuple[int | None, ...], value: Tensor, moves: bool) -> tuple[Tensor, int | None]:
    return torch.ops.fastvq.snapshot(value, moves), axes[0]


@torch.library.register_fake("fastvq::snapshot", lib=_library)
def _(value: Tensor, moves: bool) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)
