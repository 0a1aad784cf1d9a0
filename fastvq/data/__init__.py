"""Images, their splits and augmentation, image grids, and codes on disk."""

from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset, load_images, psnr, split_indices
from fastvq.data.codes import CodeDataset, extract_codes, model_checksum
from fastvq.data.digits import Digits
from fastvq.data.grid import image_grid, save_grid
from fastvq.data.images import ImageFolder

__all__ = [
    "Augment",
    "CodeDataset",
    "Digits",
    "ImageDataset",
    "ImageFolder",
    "extract_codes",
    "image_grid",
    "load_images",
    "model_checksum",
    "psnr",
    "save_grid",
    "split_indices",
]
