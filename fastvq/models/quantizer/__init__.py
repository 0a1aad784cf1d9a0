"""Vector quantisation, of one level and of several in a row, and scalar quantisation."""

from fastvq.models.quantizer.assignment import Assignment
from fastvq.models.quantizer.codebook import CODEBOOK_INITS, Codebook, CodebookInit
from fastvq.models.quantizer.finite_scalar import FSQ
from fastvq.models.quantizer.lookup_free import LFQ
from fastvq.models.quantizer.residual import ResidualVQ, ResidualVQOutput
from fastvq.models.quantizer.simvq import SimVQ
from fastvq.models.quantizer.vector import QuantizerOutput, VectorQuantizer

__all__ = [
    "CODEBOOK_INITS",
    "FSQ",
    "LFQ",
    "Assignment",
    "Codebook",
    "CodebookInit",
    "QuantizerOutput",
    "ResidualVQ",
    "ResidualVQOutput",
    "SimVQ",
    "VectorQuantizer",
]
