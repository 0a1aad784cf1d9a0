"""Vector quantisation, of one level and of several in a row."""

from fastvq.models.quantizer.assignment import Assignment
from fastvq.models.quantizer.codebook import CODEBOOK_INITS, Codebook, CodebookInit
from fastvq.models.quantizer.residual import ResidualVQ, ResidualVQOutput
from fastvq.models.quantizer.vector import QuantizerOutput, VectorQuantizer

__all__ = [
    "CODEBOOK_INITS",
    "Assignment",
    "Codebook",
    "CodebookInit",
    "QuantizerOutput",
    "ResidualVQ",
    "ResidualVQOutput",
    "VectorQuantizer",
]
