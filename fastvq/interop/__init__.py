"""Models trained with the widely used PyTorch port of VQ-VAE-2 and PixelSNAIL, as models of :mod:`fastvq.models`.

:mod:`fastvq.interop.quantizers` accelerates quantisers of other libraries where they are.

:func:`load` reads checkpoints, :func:`convert` takes live modules, :func:`recognise` tells whether a layout is known.

That port has two generations whose state dicts look alike. The activation at the start of a residual block worked in
place until July 2020 (PixelSNAIL) and January 2021 (VQVAE), so that the skip added the activated input. Checkpoints of
the older kind, the VQVAE published for 256 x 256 faces among them, need ``legacy=True``. Which kind a checkpoint is can
be seen on a few images or grids of codes: of the wrong kind, it reconstructs or predicts badly.

The port stores extracted codes as pickles, which are never read here: unpickling runs whatever code the file holds.
Load its VQVAE and extract the codes anew with :mod:`fastvq.data`.
"""

from fastvq.interop.layout import recognise
from fastvq.interop.live import convert
from fastvq.interop.load import load

__all__ = ["convert", "load", "recognise"]
