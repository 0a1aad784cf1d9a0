"""Training of both stages, with checkpoints from which a run goes on exactly."""

from fastvq.training.config import TrainConfig, learning_rate
from fastvq.training.ema import WeightAverage
from fastvq.training.loop import DivergedError
from fastvq.training.memory import TrainingMemory, training_memory
from fastvq.training.stage1 import train_vqvae
from fastvq.training.stage2 import train_prior
from fastvq.training.task import Picture
from fastvq.training.weights import load_weights

__all__ = [
    "DivergedError",
    "Picture",
    "TrainConfig",
    "TrainingMemory",
    "WeightAverage",
    "learning_rate",
    "load_weights",
    "train_prior",
    "train_vqvae",
    "training_memory",
]
