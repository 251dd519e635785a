"""Typed configurations: ``load_config`` turns a file and overrides into the read-only tree of one run."""

from .load import load_config, save_config
from .resolve import with_classes
from .schema import Config
from .tree import to_dict

__all__ = ["Config", "load_config", "save_config", "to_dict", "with_classes"]
