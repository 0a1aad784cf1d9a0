"""Lookup-free quantisation: every channel is one bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq._check import require_number, require_positive_int
from fastvq.models.quantizer.gradient import pass_gradient
from fastvq.models.quantizer.scalar import ScalarQuantizer


class LFQ(ScalarQuantizer):
    """Lookup-free quantisation (Yu et al. 2023, arXiv 2310.05737, section 3.1): the codes are the signs of D channels.

    A channel becomes 1 if it is positive, else -1, with straight-through gradient; the code is the number of these
    bits, the first channel's counting most. The entropy loss makes vectors decide and keeps all codes in use::

        entropy_weight * (mean H(p(c|x)) - diversity * H(mean p(c|x))),  p(c|x) = softmax of -|x - c|^2 / temperature

    over all 2^D codes c, in nats, and is computed exactly: the first entropy is a sum over bits, and the mean of p,
    whose two halves of bits are independent given x, is a product of two matrices of 2^(D/2) columns. The tensor of N
    vectors by 2^D codes is never made; time is that of N x 2^D products for each head. It is of this process's batch.

    Args:
        code_dim: D, the bits of a code, at most 24.
        commitment: beta of mean ``|x - sg[q]|^2``, which keeps vectors near the codes.
        entropy_weight: of the entropy loss, given as ``codebook_loss``; 0: it is not computed.
        diversity: weight of the second entropy against the first.
        temperature: of p(c|x).
        heads, input_dim, channels_last: see :class:`fastvq.VectorQuantizer`; each head has an entropy loss, and the
            mean of them is given.

    Attributes:
        num_codes: 2^D.
    """

    def __init__(
        self,
        code_dim: int,
        *,
        commitment: float = 0.25,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        heads: int = 1,
        input_dim: int | None = None,
        channels_last: bool = False,
    ) -> None:
        require_positive_int("code_dim", code_dim, maximum=24)
        self.commitment = require_number("commitment", commitment, least=0)
        self.entropy_weight = require_number("entropy_weight", entropy_weight, least=0)
        self.diversity = require_number("diversity", diversity, least=0)
        self.temperature = require_number("temperature", temperature, above=0)
        places = [2**bit for bit in reversed(range(code_dim))]
        super().__init__([2] * code_dim, places, heads=heads, input_dim=input_dim, channels_last=channels_last)

    def extra_repr(self) -> str:
        text = f"{self.code_dim}, commitment={self.commitment}, entropy_weight={self.entropy_weight}"
        return text + (f", heads={self.heads}" if self.heads > 1 else "")

    def _quantize(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        bits = (vectors.detach() > 0).long()
        return pass_gradient(vectors, (2 * bits - 1).to(vectors.dtype), "straight_through"), bits

    def _values(self, digits: Tensor) -> Tensor:
        return (2 * digits - 1).float()

    def _losses(self, vectors: Tensor, quantized: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        errors = (vectors - quantized.detach()).square()
        if real is None:
            count: int | Tensor = max(len(vectors), 1)
        else:
            count = real.sum().clamp(min=1)
            errors = torch.where(real[:, None, None], errors, 0)
        commitment = self.commitment * errors.sum() / (count * vectors.shape[1:].numel())
        if self.entropy_weight == 0:
            return commitment, torch.zeros_like(commitment)
        each, mean = _entropies(2 / self.temperature * vectors, real, count)
        return commitment, self.entropy_weight * (each - self.diversity * mean)


def _entropies(logits: Tensor, real: Tensor | None, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy of p(c|x) over vectors and heads, and entropy of its mean over vectors, averaged over heads.

    Args:
        logits: [N, heads, D]; p(c|x) is the softmax of their products with codes c of {-1, 1}^D.
        real: bool [N], which of them count; None: all.
        count: how many do.
    """
    heads, bits = logits.shape[1:]
    # A bit that is set with the odds exp(2 l); by |l| nothing cancels.
    odds = 2 * logits.abs()
    entropies = F.softplus(-odds) + odds * torch.sigmoid(-odds)
    if real is not None:
        entropies = torch.where(real[:, None, None], entropies, 0)
    each = entropies.sum() / (count * heads)
    half = bits // 2
    first, second = _softmax_over_signs(logits[..., :half]), _softmax_over_signs(logits[..., half:])
    if real is not None:
        first = torch.where(real[:, None, None], first, 0)
    mean = (first.permute(1, 2, 0) @ second.transpose(0, 1)) / count  # [heads, 2^(D // 2), 2^(D - D // 2)]
    # An unlikely code may round to 0, where the logarithm's gradient is infinite.
    surprise = -mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    return each, (mean * surprise).sum() / heads


def _softmax_over_signs(logits: Tensor) -> Tensor:
    """[..., d] to [..., 2^d]: the softmax of products with all vectors of signs, the first sign changing last."""
    bits = logits.shape[-1]
    places = torch.arange(bits - 1, -1, -1, device=logits.device)
    signs = ((torch.arange(2**bits, device=logits.device)[:, None] >> places) & 1) * 2 - 1
    return (logits @ signs.to(logits.dtype).T).softmax(-1)
