"""Small scans on the chosen kernels, forward and backward, for a sanitizer to watch: DEVICE DxLxR ..."""

from __future__ import annotations

import itertools
import sys

import torch

from .. import scan
from .checks import compare_scan


def main() -> int:
    """Compare each scan with the reference in two types, for batches of 3 and 1; return 1 if one is off."""
    device, *shapes = sys.argv[1:]
    is_well = True
    for shape, dtype, batch in itertools.product(shapes, (torch.float32, torch.bfloat16), (3, 1)):
        found = compare_scan(scan.Call(*map(int, shape.split("x"))), batch, dtype, device)
        sys.stdout.write(f"{shape} {dtype} {batch}: {found}\n")
        is_well = is_well and found["passed"]
    return 0 if is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
