"""Steps of training recorded as a CUDA graph, and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastvq._files import first_line

# Before it is recorded a step runs as usual, so that codebooks have started and kernels are compiled.
_USUAL = 3


class Recorded:
    """Calls of a function of tensors, recorded after some of them and replayed from then on.

    One launch then takes the place of some hundred to thousand, which is what small models wait for. The function must
    do the same work every time, for tensors of the same shapes, whatever the values are. Where it takes random numbers
    from the CPU's generator, which a recording would repeat, nothing is recorded and it is called as usual.

    Args:
        function: of tensors on the CPU or the device.
        device: a GPU.

    Attributes:
        recording: whether calls are recorded, as far as is known.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.recording = True

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """What the function returns of these."""
        self._calls += 1
        if self.recording and self._graph is None and self._calls > _USUAL:
            self._record(tensors)
        if self._graph is None:
            return self._function([tensor.to(self._device, non_blocking=True) for tensor in tensors])
        for kept, given in zip(self._inputs, tensors, strict=True):
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _record(self, tensors: Sequence[Tensor]) -> None:
        inputs = tuple(tensor.to(self._device, copy=True) for tensor in tensors)
        before = torch.get_rng_state()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = self._function(inputs)
        except RuntimeError as error:
            warnings.warn(f"steps are not recorded as a CUDA graph: {first_line(error)}", stacklevel=2)
            self.recording = False
        else:
            self.recording = torch.equal(before, torch.get_rng_state())
        if self.recording:
            self._inputs, self._result, self._graph = inputs, result, graph
        else:
            torch.set_rng_state(before)
