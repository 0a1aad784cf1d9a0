"""The backends of the EMA update, and the operation registered for it."""

from __future__ import annotations

from torch import Tensor

from fastvq.ops._registered import Registered
from fastvq.ops.dispatch import Backend, Backends, anywhere
from fastvq.ops.ema_update import cpp, triton
from fastvq.ops.ema_update.options import Options
from fastvq.ops.ema_update.reference import ema_update_reference

BACKENDS = Backends(
    "ema_update",
    [
        Backend("cpp", cpp.why_not, cpp.cpp_ema_update),
        Backend("triton", triton.why_not, triton.triton_ema_update, gpu=True),
        Backend("torch", anywhere, lambda *given: ema_update_reference(*given[:-1], *given[-1][:-1])),
    ],
)


def _run(
    counts: Tensor, sums: Tensor, cluster_size: Tensor, embedding_sum: Tensor, embedding: Tensor, options: Options
) -> None:
    given = counts, sums, cluster_size, embedding_sum, embedding
    BACKENDS.select(options.backend, *given).run(*given, options)


ema_update = Registered(
    "ema_update(Tensor counts, Tensor sums, Tensor(a!) cluster_size, Tensor(b!) embedding_sum, Tensor(c!) embedding,"
    " float decay, float eps, bool skip_unusable, str? backend) -> ()",
    Options,
    _run,
    lambda *given: None,
)
