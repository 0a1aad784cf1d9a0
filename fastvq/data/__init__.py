"""Images, their splits and augmentation, image grids, and codes on disk."""

from fastvq._shards import Shard
from fastvq.data.animation import save_animation
from fastvq.data.augment import Augment
from fastvq.data.base import ImageDataset, load_images, psnr, split_indices
from fastvq.data.codes import CodeDataset, model_checksum
from fastvq.data.digits import Digits
from fastvq.data.extraction import extract_codes, extract_shard, merge_codes
from fastvq.data.grid import image_grid, save_grid
from fastvq.data.images import ImageFolder
from fastvq.data.made_elsewhere import import_codes
from fastvq.data.region import box_region, load_picture, mask_region

__all__ = [
    "Augment",
    "CodeDataset",
    "Digits",
    "ImageDataset",
    "ImageFolder",
    "Shard",
    "box_region",
    "extract_codes",
    "extract_shard",
    "image_grid",
    "import_codes",
    "load_images",
    "load_picture",
    "mask_region",
    "merge_codes",
    "model_checksum",
    "psnr",
    "save_animation",
    "save_grid",
    "split_indices",
]
