"""MobileMamba: leaf to network, one file a level."""

from .fuse import fuse
from .mobilemamba import VARIANTS, MobileMamba
from .shapes import variant_shapes

__all__ = ["VARIANTS", "MobileMamba", "fuse", "variant_shapes"]
