"""Data sets, transforms, samplers and loaders."""

from .datasets import DATASETS, check_dataset
from .loaders import Loaders, TestLoader, TrainLoader, build_loaders, worker_failures
from .samples import Batch
from .transforms import build_transform

__all__ = [
    "DATASETS",
    "Batch",
    "Loaders",
    "TestLoader",
    "TrainLoader",
    "build_loaders",
    "build_transform",
    "check_dataset",
    "worker_failures",
]
