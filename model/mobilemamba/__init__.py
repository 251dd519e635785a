"""MobileMamba: leaf to network, one file a level."""

from .mobilemamba import VARIANTS, MobileMamba

__all__ = ["VARIANTS", "MobileMamba"]
