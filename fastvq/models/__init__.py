"""Plain PyTorch models: quantiser, autoencoders, priors; their configurations and presets."""

from fastvq._config import Config
from fastvq.models.classifier import Classifier, ClassifierConfig
from fastvq.models.pixelcnn import GatedPixelCNN, GatedPixelCNNConfig
from fastvq.models.pixelsnail import PixelSNAIL, PixelSNAILConfig
from fastvq.models.plain_pixelcnn import PixelCNN, PixelCNNConfig
from fastvq.models.pretrained import MODEL_CLASSES, PRESETS, PretrainedModel, build, load_pretrained, preset
from fastvq.models.prior import Prior, PriorConfig
from fastvq.models.quantizer import FSQ, LFQ, QuantizerOutput, ResidualVQ, ResidualVQOutput, SimVQ, VectorQuantizer
from fastvq.models.vqvae import VQVAE, VQVAE2, HierarchicalVQVAE, VQVAEConfig, VQVAEOutput

__all__ = [
    "FSQ",
    "LFQ",
    "MODEL_CLASSES",
    "PRESETS",
    "VQVAE",
    "VQVAE2",
    "Classifier",
    "ClassifierConfig",
    "Config",
    "GatedPixelCNN",
    "GatedPixelCNNConfig",
    "HierarchicalVQVAE",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "PretrainedModel",
    "Prior",
    "PriorConfig",
    "QuantizerOutput",
    "ResidualVQ",
    "ResidualVQOutput",
    "SimVQ",
    "VQVAEConfig",
    "VQVAEOutput",
    "VectorQuantizer",
    "build",
    "load_pretrained",
    "preset",
]
