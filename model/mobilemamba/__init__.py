"""MobileMamba: leaf to network, one file a level."""

from .mobilemamba import VARIANTS, MobileMamba
from .shapes import variant_shapes

__all__ = ["VARIANTS", "MobileMamba", "variant_shapes"]
