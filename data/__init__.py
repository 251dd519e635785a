"""Data sets, transforms, samplers and loaders."""

from .base import ImageDataset
from .class_names import ClassNames, find_class_names
from .datasets import DATASETS, check_dataset, count_classes, open_first
from .images import MODES, UnreadableImageError
from .loaders import Loaders, TestLoader, TrainLoader, build_loaders, describe_workers, worker_failures
from .pictures import Pictures
from .samples import Batch
from .transforms import build_transform

__all__ = [
    "DATASETS",
    "MODES",
    "Batch",
    "ClassNames",
    "ImageDataset",
    "Loaders",
    "Pictures",
    "TestLoader",
    "TrainLoader",
    "UnreadableImageError",
    "build_loaders",
    "build_transform",
    "check_dataset",
    "count_classes",
    "describe_workers",
    "find_class_names",
    "open_first",
    "worker_failures",
]
