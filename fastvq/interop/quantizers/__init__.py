"""Quantisers of other projects inside models, accelerated in place.

:func:`accelerate` replaces what known quantisers compute with, :func:`restore` undoes it, :func:`acceleration` tells
what was replaced and what was left.
"""

from fastvq.interop.quantizers.in_place import Acceleration, Known, accelerate, acceleration, restore

__all__ = ["Acceleration", "Known", "accelerate", "acceleration", "restore"]
