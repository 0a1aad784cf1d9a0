"""Who assigns vectors to codes in the benchmark: fastvq, plain PyTorch in its strongest forms, and other libraries.

All of them look for the nearest code; what training needs on top is the same code for all, except where a library
brings its own.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bench.cases import NearestCodeCase
from bench.machine import allowing_tf32
from bench.nearest_code import (
    COMMITMENT,
    DECAY,
    EPS,
    TRIAL_ROWS,
    Averages,
    Contender,
    Find,
    NearestCode,
    Search,
    most_bytes,
)
from bench.registry import LeftOutError, peer
from fastvq.models import VectorQuantizer
from fastvq.ops import ema_update
from fastvq.ops.nearest_code import nearest_code, nearest_code_statistics
from fastvq.ops.nearest_code.backends import BACKENDS

# Above this the product alone is not written in full: its buffer is there while all the others run.
_MOST_PRODUCT_BYTES = 1e9
# Rows and codes of a tile.
TILES = ((256, 1024), (128, 1024), (256, 512), (512, 1024), (128, 2048))


def _cpu(case: NearestCodeCase) -> bool:
    return case.device == "cpu"


def _cuda(case: NearestCodeCase) -> bool:
    return case.device == "cuda"


class Fastvq(Search):
    """The public function, with the backend that it chooses or a given one."""

    def __init__(self, problem: NearestCode, **keywords: Any) -> None:
        super().__init__(problem, {"": lambda x, codebook: nearest_code(x, codebook, **keywords)})
        self.keywords, self.exact = keywords, keywords.get("mode") != "fast"
        self.remarks = [f"backend {keywords.get('backend') or chosen_backend(problem)}"]

    def step(self, x: Tensor) -> Tensor:
        a = self.averages()
        if a is None:
            return super().step(x)
        with torch.no_grad():
            found = nearest_code_statistics(x, a.embedding, **self.keywords)
            buffers = a.cluster_size, a.embedding_sum, a.embedding
            ema_update(found.counts, found.sums, *buffers, decay=DECAY, eps=EPS)
        return found.indices


def chosen_backend(problem: NearestCode) -> str:
    """The backend that runs when none is asked for."""
    x, codebook = problem.inputs[0].detach()[None], problem.codebook[None]
    return BACKENDS.select(None, x, codebook).name


peer("nearest code", name="fastvq")(Fastvq)


@peer("nearest code", name="fastvq fast", takes=_cuda)
def fast(problem: NearestCode) -> Fastvq:
    return Fastvq(problem, mode="fast")


@peer("nearest code", name="torch")
def fallback(problem: NearestCode) -> Fastvq:
    """What runs where there is neither the extension nor Triton."""
    if chosen_backend(problem) == "torch":
        raise LeftOutError("it is the backend of fastvq here")
    return Fastvq(problem, backend="torch")


@peer("quantiser module", name="fastvq")
class FastvqModule(Contender):
    """`fastvq.models.VectorQuantizer` in training."""

    def __init__(self, problem: NearestCode) -> None:
        super().__init__(problem)
        shape = self.case.num_codes, self.case.code_dim
        self.module = VectorQuantizer(*shape, decay=DECAY, eps=EPS, commitment=COMMITMENT, channels_last=True)
        self.module.to(self.case.device).train()

    def averages(self) -> Averages:
        sums = self.module.embedding_sum
        assert sums is not None
        return Averages(self.module.cluster_size, sums, self.module.embedding)

    def step(self, x: Tensor) -> Tensor:
        return self.module(x).codes


def formula(x: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 / 2 - x.c for all pairs at once; |x|^2 is the same for every code."""
    return torch.addmm(codebook.square().sum(1) / 2, x.float(), codebook.T, alpha=-1).argmin(1)


@peer("nearest code", name="eager")
def eager(problem: NearestCode) -> Search:
    return Search(problem, {"": formula}, bytes_per_score=4)


@peer("nearest code", name="cdist")
def cdist(problem: NearestCode) -> Search:
    return Search(problem, {"": lambda x, codebook: torch.cdist(x.float(), codebook).argmin(1)}, bytes_per_score=4)


@peer("nearest code", name="chunked addmm")
def chunked(problem: NearestCode, most: tuple[int, ...] = ()) -> Search:
    """The formula by chunks of rows, in a reused buffer, with the quicker of two ways to the index of the least."""
    codes, device = problem.case.num_codes, problem.case.device
    sizes = (1 << 20, 1 << 18, 1 << 22) if device == "cpu" else (1 << 26, 1 << 24, 1 << 28)
    counts = most or tuple(max(1, size // codes) for size in sizes)
    # Rows are taken from its beginning.
    buffer = torch.empty(max(counts), codes, device=device)

    def form(rows: int, way: str) -> Find:
        def find(x: Tensor, codebook: Tensor) -> Tensor:
            half_norms = codebook.square().sum(1) / 2
            indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
            for start in range(0, len(x), rows):
                part = x[start : start + rows].float()
                scores = torch.addmm(half_norms, part, codebook.T, alpha=-1, out=buffer[: len(part)])
                into = indices[start : start + rows]
                if way == "argmin":
                    torch.argmin(scores, 1, out=into)
                else:
                    into.copy_(scores.min(1).indices)
            return indices

        return find

    return Search(
        problem, {f"{rows} rows at a time, {way}": form(rows, way) for rows in counts for way in ("argmin", "min")}
    )


@peer("nearest code", name="tiled numpy argmin", takes=_cpu)
def tiled(problem: NearestCode, tiles: tuple[tuple[int, int], ...] = TILES) -> Search:
    """Tiles of N x K that stay in the cache, NumPy's argmin of each, one thread per core."""
    pool = ThreadPoolExecutor(problem.threads, initializer=torch.set_num_threads, initargs=(1,))

    def form(tile: tuple[int, int]) -> Find:
        def find(x: Tensor, codebook: Tensor) -> Tensor:
            half_norms = codebook.square().sum(1) / 2
            indices = torch.empty(len(x), dtype=torch.int64)
            # More pieces than threads, so that none waits long for the others.
            rows = max(tile[0], math.ceil(len(x) / (8 * problem.threads) / tile[0]) * tile[0])
            pieces = [slice(start, start + rows) for start in range(0, len(x), rows)]

            def work(piece: slice) -> None:
                with torch.inference_mode():
                    _search_tiles(tile, x[piece], half_norms, codebook, indices[piece])

            list(pool.map(work, pieces))
            return indices

        return find

    return Search(problem, {f"tiles of {n} x {min(k, problem.case.num_codes)}": form((n, k)) for n, k in tiles})


def _search_tiles(tile: tuple[int, int], x: Tensor, half_norms: Tensor, codebook: Tensor, indices: Tensor) -> None:
    rows, width = tile[0], min(tile[1], len(codebook))
    buffer = torch.empty(rows * width)
    for top in range(0, len(x), rows):
        part = x[top : top + rows].float()
        least: Tensor | None = None
        for left in range(0, len(codebook), width):
            codes = codebook[left : left + width]
            scores = buffer[: len(part) * len(codes)].view(len(part), len(codes))
            torch.addmm(half_norms[left : left + width], part, codes.T, alpha=-1, out=scores)
            found = torch.from_numpy(scores.numpy().argmin(1))
            values = scores.gather(1, found[:, None]).squeeze(1)
            if least is None:
                least, best = values, found
            else:
                nearer = values < least
                best = torch.where(nearer, found + left, best)
                least = torch.where(nearer, values, least)
        indices[top : top + rows] = best


@peer("nearest code", name="torch.compile", optional=True)
def compiled(problem: NearestCode) -> Search:
    """The formula compiled, on all rows or by chunks of them, whichever is quicker."""
    case = problem.case
    # Compiled functions of other shapes count against a limit.
    torch.compiler.reset()
    if not problem.tuned:
        return Search(problem, {"": torch.compile(formula, dynamic=False, backend="eager")})
    function = torch.compile(formula, dynamic=False)
    chunk = max(64, (1 << 20 if case.device == "cpu" else 1 << 26) // case.num_codes)

    def by_chunks(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.cat([function(part, codebook) for part in x.split(chunk)])

    forms: dict[str, tuple[Find, int]] = {}
    if chunk < case.batch and case.batch % chunk == 0:
        # Another number of rows would be compiled again.
        forms[f"{chunk} rows at a time"] = (by_chunks, math.ceil(TRIAL_ROWS / chunk) * chunk)
    # The product, and what it becomes.
    if 8 * case.scores <= most_bytes(case.device) or not forms:
        forms["whole"] = (function, case.batch)
    found = {name: form for name, (form, _) in forms.items()}
    return Search(problem, found, rows=[rows for _, rows in forms.values()])


@peer(
    "nearest code",
    "quantiser module",
    name="vector-quantize-pytorch",
    requires=("vector_quantize_pytorch", "vector-quantize-pytorch"),
)
class VectorQuantizePytorch(Contender):
    """The quantiser of vector-quantize-pytorch, with the same settings and everything optional off."""

    bytes_per_score = 16

    def __init__(self, problem: NearestCode) -> None:
        super().__init__(problem)
        from vector_quantize_pytorch import VectorQuantize

        self.module = VectorQuantize(
            dim=self.case.code_dim,
            codebook_size=self.case.num_codes,
            decay=DECAY,
            eps=EPS,
            commitment_weight=COMMITMENT,
            kmeans_init=False,
            threshold_ema_dead_code=0,
            rotation_trick=False,
        ).to(self.case.device)
        self.module.train(self.case.what != "forward")
        self.module._codebook.embed[0].copy_(problem.codebook)
        if self.case.what == "module":
            # The distances are kept for a backward pass.
            self.bytes_per_score = 24

    def step(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.case.what == "module"):
            return self.module(x[None])[1][0]

    def averages(self) -> Averages | None:
        book = self.module._codebook
        return None if self.case.what == "forward" else Averages(book.cluster_size[0], book.embed_avg[0], book.embed[0])


@peer(
    "nearest code", name="faiss-cpu", requires=("faiss", "faiss-cpu"), takes=lambda c: _cpu(c) and c.what == "forward"
)
def faiss_flat(problem: NearestCode) -> Search:
    """An exact index, built outside of the time, with its block of queries tuned."""
    import faiss

    index = faiss.IndexFlatL2(problem.case.code_dim)
    index.add(problem.codebook.numpy())

    def form(block: int) -> Find:
        def find(x: Tensor, codebook: Tensor) -> Tensor:
            faiss.omp_set_num_threads(problem.threads)
            faiss.cvar.distance_compute_blas_query_bs = block
            return torch.from_numpy(index.search(x.float().numpy(), 1)[1][:, 0])

        return find

    return Search(problem, {f"blocks of {block} queries": form(block) for block in (256, 512, 1024)})


class ProductOnly(Contender):
    """The product of all vectors and all codes, written to memory: not the operation, but what its floor looks like."""

    whole = False

    def __init__(self, problem: NearestCode, unit: str = "cpu float32") -> None:
        super().__init__(problem)
        self.tf32 = unit == "cuda tf32"
        self.dtype = torch.bfloat16 if unit == "cuda bfloat16" else torch.float32
        self.inputs = [x.detach().to(self.dtype) for x in problem.inputs]
        self.codes = problem.codebook.to(self.dtype).T
        self.rows, codes = self.case.batch, self.case.num_codes
        if self.dtype.itemsize * self.case.scores > _MOST_PRODUCT_BYTES:
            self.rows = (1 << 22 if self.case.device == "cpu" else 1 << 28) // codes
        self.buffer = torch.zeros(self.rows, codes, dtype=self.dtype, device=self.case.device)
        self.remarks = [
            "written in full" if self.rows == self.case.batch else f"{self.rows} rows at a time, one buffer"
        ]

    def prepare(self) -> None:
        self.x = self.inputs[self._next % len(self.inputs)]
        self._next += 1

    def pace(self) -> float:
        self.prepare()
        return super().pace()

    def step(self, x: Tensor) -> Tensor:
        with torch.no_grad(), allowing_tf32(self.tf32):
            for part in x.split(self.rows):
                torch.mm(part, self.codes, out=self.buffer[: len(part)])
        return self.buffer

    def averages(self) -> None:
        return None


peer("nearest code", name="gemm only", takes=_cpu)(ProductOnly)
for _unit in ("float32", "tf32", "bfloat16"):
    peer("nearest code", name=f"gemm only, {_unit}", takes=_cuda)(functools.partial(ProductOnly, unit=f"cuda {_unit}"))
