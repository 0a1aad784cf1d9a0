"""A quantiser of every known kind, with inputs for it: hand-written ones, and those of packages that are installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any, NamedTuple

import foreign_quantizers as written
import pytest
import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """How a quantiser is made, and the shape of its input [.., N.., D..] of N vectors of D."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def pair(self, accelerate: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module]:
        """The original, and one of the same state that is accelerated."""
        torch.manual_seed(3)
        theirs, ours = self.make(), self.make()
        with torch.no_grad():
            for name, value in [*theirs.named_parameters(), *theirs.named_buffers()]:
                # Some start with codes that are all zero, or close to it.
                if name.endswith(("embed", "embed_sum", "codebook.weight", "embedding.weight")) and value.ndim > 1:
                    value.normal_()
        ours.load_state_dict(theirs.state_dict())
        return theirs, accelerate(ours)

    def input(self, seed: int) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


def package(name: str) -> Any:
    """A module of an installed package, or a skip. What only reads sound may be broken."""
    stub = types.ModuleType("torchaudio")
    stub.__spec__ = ModuleSpec("torchaudio", None)
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = stub
    try:
        return pytest.importorskip(name)
    finally:
        if sys.modules["torchaudio"] is stub:
            del sys.modules["torchaudio"]


def transformers(family: str, cls: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        modeling = package(f"transformers.models.{family}.modeling_{family}")
        config = getattr(modeling, f"{family.capitalize()}Config")(codebook_size=32, codebook_dim=8, **options)
        return getattr(modeling, cls)(config)

    return make


def vq(**options: Any) -> Callable[[], nn.Module]:
    return lambda: package("vector_quantize_pytorch").VectorQuantize(8, 24, **options)


def rvq(**options: Any) -> Callable[[], nn.Module]:
    options = {"dim": 8, "num_quantizers": 3, "codebook_size": 24, **options}
    return lambda: package("vector_quantize_pytorch").ResidualVQ(**options)


def monai(**options: Any) -> Callable[[], nn.Module]:
    options = {"spatial_dims": 2, "num_embeddings": 24, "embedding_dim": 8, **options}
    return lambda: package("monai.networks.layers.vector_quantizer").EMAQuantizer(**options)


def encodec(**options: Any) -> Callable[[], nn.Module]:
    return lambda: package("encodec.quantization.core_vq").EuclideanCodebook(8, 24, **options)


ROWS, IMAGE, VIDEO, SEQUENCE = (4, 40, 8), (4, 8, 5, 8), (2, 8, 5, 4, 4), (4, 8, 40)
WRITTEN = {
    "port": Case(lambda: written.Quantize(8, 24, decay=0.9), (4, 5, 8, 8)),
    "VQGAN": Case(lambda: written.VectorQuantizer2(24, 8, 0.25), IMAGE),
    "VQGAN, used codes": Case(lambda: written.VectorQuantizer2(24, 8, 0.25, remap=[3, 7, 1], legacy=False), IMAGE),
    "VQGAN, grid": Case(lambda: written.VectorQuantizer2(24, 8, 0.25, sane_index_shape=True), IMAGE),
    "DAC": Case(lambda: written.VectorQuantize(8, 24, 6), SEQUENCE),
    "Encodec": Case(lambda: written.EuclideanCodebook(8, 24), ROWS),
}
# Options of vector-quantize-pytorch that are computed with.
VQ = {
    "plain": Case(vq(), ROWS),
    "straight through": Case(vq(rotation_trick=False), ROWS),
    "no route": Case(vq(route_gradients_to_input=False), ROWS),
    "projected": Case(vq(codebook_dim=5), ROWS),
    "layer norm": Case(vq(codebook_dim=5, layernorm_after_project_in=True), ROWS),
    "heads": Case(vq(heads=2, codebook_dim=4), ROWS),
    "heads apart": Case(vq(heads=2, codebook_dim=4, separate_codebook_per_head=True), ROWS),
    "cosine": Case(vq(use_cosine_sim=True), ROWS),
    "cosine, dead codes": Case(vq(use_cosine_sim=True, threshold_ema_dead_code=1), ROWS),
    "heads apart, cosine": Case(
        vq(heads=2, codebook_dim=4, separate_codebook_per_head=True, use_cosine_sim=True), ROWS
    ),
    "k-means, dead codes": Case(vq(kmeans_init=True, threshold_ema_dead_code=2), ROWS),
    "learnable": Case(vq(learnable_codebook=True, ema_update=False), ROWS),
    "learnable, dead codes": Case(
        vq(learnable_codebook=True, ema_update=False, threshold_ema_dead_code=1, rotation_trick=False), ROWS
    ),
    "by hand": Case(vq(manual_ema_update=True), ROWS),
    "frozen": Case(vq(freeze_codebook=True), ROWS),
    "no commitment": Case(vq(commitment_weight=0.0), ROWS),
    "channels first": Case(vq(channel_last=False), SEQUENCE),
    "image": Case(vq(accept_image_fmap=True), IMAGE),
    "image, straight through": Case(vq(accept_image_fmap=True, rotation_trick=False), IMAGE),
    "video": Case(vq(accept_3d_fmap=True), VIDEO),
}
RVQ = {
    "plain": Case(rvq(), ROWS),
    "straight through": Case(rvq(rotation_trick=False), ROWS),
    "no route": Case(rvq(route_gradients_to_input=False), ROWS),
    "projected": Case(rvq(codebook_dim=5), ROWS),
    "dead codes": Case(rvq(kmeans_init=True, threshold_ema_dead_code=2, rotation_trick=False), ROWS),
    "dropout": Case(rvq(quantize_dropout=True, num_quantizers=5, quantize_dropout_multiple_of=2), ROWS),
    "by level, cosine": Case(rvq(use_cosine_sim=True), ROWS),
    "by level, shared": Case(rvq(shared_codebook=True), ROWS),
}
OTHERS = {
    "MONAI": Case(monai(), IMAGE),
    "MONAI, 3-D": Case(monai(spatial_dims=3, decay=0.7, commitment_cost=0.5), VIDEO),
    "encodec": Case(encodec(), ROWS),
    "encodec, k-means": Case(encodec(kmeans_init=True, decay=0.8), ROWS),
    "transformers DAC": Case(transformers("dac", "DacVectorQuantize", hidden_size=8), SEQUENCE),
}
# Codebooks that are asked for codes alone.
ENCODERS = {
    "transformers Mimi": Case(transformers("mimi", "MimiEuclideanCodebook"), ROWS),
    "transformers Encodec": Case(transformers("encodec", "EncodecEuclideanCodebook"), ROWS),
}
STEPPED = {
    **WRITTEN,
    **{f"VectorQuantize, {name}": case for name, case in VQ.items()},
    **{f"ResidualVQ, {name}": case for name, case in RVQ.items()},
    **OTHERS,
}
