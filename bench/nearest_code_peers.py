"""Who assigns vectors to codes in the benchmark: fastvq, plain PyTorch in its strongest forms, and other libraries.

All of them look for the nearest code; what training needs on top is the same code for all, except where a library
brings its own.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from bench.cases import NearestCodeCase
from bench.harness import timed
from bench.machine import allowing_tf32
from bench.nearest_code_contender import (
    COMMITMENT,
    DECAY,
    EPS,
    TRIAL_ROWS,
    Averages,
    Contender,
    Problem,
    most_bytes,
)
from fastvq.models import VectorQuantizer
from fastvq.ops import ema_update
from fastvq.ops.nearest_code import nearest_code, nearest_code_statistics
from fastvq.ops.nearest_code.backends import BACKENDS

# Above this the product alone is not written in full: its buffer is there while all the others run.
_MOST_PRODUCT_BYTES = 1e9


class Fastvq(Contender):
    """The public function, with the backend that it chooses or a given one."""

    def __init__(
        self,
        name: str,
        problem: Problem,
        backend: str | None = None,
        mode: Literal["exact", "fast"] = "exact",
    ) -> None:
        super().__init__(name, problem)
        self.backend, self.exact = backend, mode == "exact"
        self.keywords: dict[str, Any] = {"backend": backend, "mode": mode}
        self.remarks = [f"backend {backend or chosen_backend(problem)}"]

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return nearest_code(x, codebook, **self.keywords)

    def step(self, x: Tensor) -> Tensor:
        if self._averages is None:
            return super().step(x)
        with torch.no_grad():
            found = nearest_code_statistics(x, self._averages.embedding, **self.keywords)
            a = self._averages
            buffers = a.cluster_size, a.embedding_sum, a.embedding
            ema_update(found.counts, found.sums, *buffers, decay=DECAY, eps=EPS)
        return found.indices


def chosen_backend(problem: Problem) -> str:
    """The backend that runs when none is asked for."""
    x, codebook = problem.inputs[0].detach()[None], problem.codebook[None]
    return BACKENDS.select(None, x, codebook).name


class FastvqModule(Contender):
    """`fastvq.models.VectorQuantizer` in training."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
        shape = self.case.num_codes, self.case.code_dim
        self.module = VectorQuantizer(*shape, decay=DECAY, eps=EPS, commitment=COMMITMENT, channels_last=True)
        self.module.to(self.case.device).train()

    def averages(self) -> Averages:
        sums = self.module.embedding_sum
        assert sums is not None
        return Averages(self.module.cluster_size, sums, self.module.embedding)

    def reset(self) -> None:
        self.averages().reset(self.problem.codebook)

    def step(self, x: Tensor) -> Tensor:
        return self.module(x).codes

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        raise NotImplementedError


def formula(x: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 / 2 - x.c for all pairs at once; |x|^2 is the same for every code."""
    return torch.addmm(codebook.square().sum(1) / 2, x.float(), codebook.T, alpha=-1).argmin(1)


class Eager(Contender):
    bytes_per_score = 4

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return formula(x, codebook)


class Cdist(Contender):
    bytes_per_score = 4

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return torch.cdist(x.float(), codebook).argmin(1)


class Chunked(Contender):
    """The formula by chunks of rows, in a reused buffer, with the quicker of two ways to the index of the least."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
        codes = self.case.num_codes
        self.sizes = (1 << 20, 1 << 18, 1 << 22) if self.case.device == "cpu" else (1 << 26, 1 << 24, 1 << 28)
        self.rows, self.way = max(1, self.sizes[0] // codes), "argmin"
        # Rows are taken from its beginning.
        self.buffer = torch.empty(max(self.sizes) // codes + 1, codes, device=self.case.device)

    def tune(self) -> None:
        forms = {}
        for size in self.sizes:
            rows = max(1, size // self.case.num_codes)
            for way in ("argmin", "min"):
                forms[f"{rows} {way}"] = functools.partial(self._search, rows, way)
        trial, codebook = self.problem.trial().detach(), self.problem.codebook
        best = self.problem.best({name: functools.partial(form, trial, codebook) for name, form in forms.items()})
        self.rows, self.way = int(best.split()[0]), best.split()[1]
        self.remarks = [f"{self.rows} rows at a time, {self.way}"]

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return self._search(self.rows, self.way, x, codebook)

    def _search(self, rows: int, way: str, x: Tensor, codebook: Tensor) -> Tensor:
        half_norms, codes = codebook.square().sum(1) / 2, codebook.T
        indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows].float()
            scores = torch.addmm(half_norms, part, codes, alpha=-1, out=self.buffer[: len(part)])
            into = indices[start : start + rows]
            if way == "argmin":
                torch.argmin(scores, 1, out=into)
            else:
                into.copy_(scores.min(1).indices)
        return indices


class Tiled(Contender):
    """Tiles of N x K that stay in the cache, NumPy's argmin of each, one thread per core."""

    # Rows and codes of a tile.
    tiles = ((256, 1024), (128, 1024), (256, 512), (512, 1024), (128, 2048))

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
        self.tile = self.tiles[0]
        self.pool = ThreadPoolExecutor(problem.threads, initializer=torch.set_num_threads, initargs=(1,))

    def tune(self) -> None:
        trial, codebook = self.problem.trial().detach(), self.problem.codebook
        forms = {f"{tile[0]} {tile[1]}": functools.partial(self._search, tile, trial, codebook) for tile in self.tiles}
        rows, codes = self.problem.best(forms).split()
        self.tile = int(rows), int(codes)
        self.remarks = [f"tiles of {rows} x {min(int(codes), self.case.num_codes)}"]

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return self._search(self.tile, x, codebook)

    def _search(self, tile: tuple[int, int], x: Tensor, codebook: Tensor) -> Tensor:
        half_norms = codebook.square().sum(1) / 2
        indices = torch.empty(len(x), dtype=torch.int64)
        # More pieces than threads, so that none waits long for the others.
        rows = max(tile[0], math.ceil(len(x) / (8 * self.problem.threads) / tile[0]) * tile[0])
        pieces = [slice(start, start + rows) for start in range(0, len(x), rows)]

        def work(piece: slice) -> None:
            with torch.inference_mode():
                _search_tiles(tile, x[piece], half_norms, codebook, indices[piece])

        list(self.pool.map(work, pieces))
        return indices


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


class Compiled(Contender):
    """The formula compiled, on all rows or by chunks of them, whichever is quicker."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
        self.rows = self.case.batch
        self.compiled: Callable[[Tensor, Tensor], Tensor] = formula

    @torch.no_grad()
    def tune(self) -> None:
        # Compiled functions of other shapes count against a limit.
        torch.compiler.reset()
        if not self.problem.tuned:
            self.compiled = torch.compile(formula, dynamic=False, backend="eager")
            return
        self.compiled = torch.compile(formula, dynamic=False)
        scores = 1 << 20 if self.case.device == "cpu" else 1 << 26
        chunk = max(64, scores // self.case.num_codes)
        forms = [chunk] if chunk < self.case.batch and self.case.batch % chunk == 0 else []
        # The product, and what it becomes.
        if 8 * self.case.scores <= most_bytes(self.case.device) or not forms:
            forms.append(self.case.batch)
        x, codebook = self.x.detach(), self.problem.codebook
        times = {}
        for rows in forms:
            # One call on the rows that it will be compiled for.
            self.compiled(x[:rows], codebook)
            part = x[: max(rows, min(len(x), TRIAL_ROWS))]
            run = functools.partial(self._search, rows, part, codebook)
            times[rows] = min(timed(run, device=self.case.device) for _ in range(2)) * len(x) / len(part)
        self.rows = min(times, key=times.__getitem__)
        self.remarks = ["whole" if self.rows == self.case.batch else f"{self.rows} rows at a time"]

    def pace(self) -> float:
        # Other numbers of rows would be compiled again.
        part = self.x[: max(self.rows, min(len(self.x), TRIAL_ROWS))]
        return timed(self.step, part, device=self.case.device) * len(self.x) / len(part)

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return self._search(self.rows, x, codebook)

    def _search(self, rows: int, x: Tensor, codebook: Tensor) -> Tensor:
        if rows >= len(x):
            return self.compiled(x, codebook)
        return torch.cat([self.compiled(part, codebook) for part in x.split(rows)])


class VectorQuantizePytorch(Contender):
    """The quantiser of vector-quantize-pytorch, with the same settings and everything optional off."""

    bytes_per_score = 16

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
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
        if self.case.what == "module":
            # The distances are kept for a backward pass.
            self.bytes_per_score = 24
        self.reset()

    @staticmethod
    def missing(case: NearestCodeCase) -> str | None:
        return _not_installed("vector_quantize_pytorch", "vector-quantize-pytorch")

    def step(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.case.what == "module"):
            return self.module(x[None])[1][0]

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        raise NotImplementedError

    def averages(self) -> Averages | None:
        return None if self.case.what == "forward" else self._buffers()

    def reset(self) -> None:
        self._buffers().reset(self.problem.codebook)

    def _buffers(self) -> Averages:
        book = self.module._codebook
        return Averages(book.cluster_size[0], book.embed_avg[0], book.embed[0])


class Faiss(Contender):
    """An exact index, built outside of the time, with its block of queries tuned."""

    def __init__(self, name: str, problem: Problem) -> None:
        super().__init__(name, problem)
        import faiss

        self.faiss, self.block = faiss, 256
        self.index = faiss.IndexFlatL2(self.case.code_dim)
        self.index.add(problem.codebook.numpy())

    @staticmethod
    def missing(case: NearestCodeCase) -> str | None:
        return _not_installed("faiss", "faiss-cpu")

    def tune(self) -> None:
        trial, codebook = self.problem.trial(), self.problem.codebook
        forms = {str(size): functools.partial(self._search, size, trial, codebook) for size in (256, 512, 1024)}
        self.block = int(self.problem.best(forms))
        self.remarks = [f"blocks of {self.block} queries"]

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        return self._search(self.block, x, codebook)

    def _search(self, block: int, x: Tensor, codebook: Tensor) -> Tensor:
        self.faiss.omp_set_num_threads(self.problem.threads)
        self.faiss.cvar.distance_compute_blas_query_bs = block
        _, indices = self.index.search(x.float().numpy(), 1)
        return torch.from_numpy(indices[:, 0])


class ProductOnly(Contender):
    """The product of all vectors and all codes, written to memory: not the operation, but what its floor looks like."""

    whole = False

    def __init__(self, name: str, problem: Problem, unit: str = "cpu float32") -> None:
        super().__init__(name, problem)
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

    def search(self, x: Tensor, codebook: Tensor) -> Tensor:
        raise NotImplementedError


def _not_installed(module: str, package: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{package} is not installed"


Factory = Callable[[Problem], Contender]


def factories(problem: Problem) -> Iterator[tuple[str, type[Contender], Factory]]:
    """Name, class and maker of everyone who takes part in a case."""
    case = problem.case

    def one(name: str, kind: type[Contender], **options: Any) -> tuple[str, type[Contender], Factory]:
        return name, kind, lambda problem: kind(name, problem, **options)

    vqp = one("vector-quantize-pytorch", VectorQuantizePytorch)
    if case.what == "module":
        yield from (one("fastvq", FastvqModule), vqp)
        return
    yield one("fastvq", Fastvq)
    if case.device == "cuda":
        yield one("fastvq fast", Fastvq, mode="fast")
    if chosen_backend(problem) != "torch":
        yield one("torch", Fastvq, backend="torch")
    yield from (one("eager", Eager), one("cdist", Cdist), one("chunked addmm", Chunked))
    if case.device == "cpu":
        yield one("tiled numpy argmin", Tiled)
    yield from (one("torch.compile", Compiled), vqp)
    if case.device == "cpu":
        if case.what == "forward":
            yield one("faiss-cpu", Faiss)
        yield one("gemm only", ProductOnly)
    else:
        for unit in ("float32", "tf32", "bfloat16"):
            yield one(f"gemm only, {unit}", ProductOnly, unit=f"cuda {unit}")
