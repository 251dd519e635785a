"""One small scan on every chosen kernel, forward and backward, for a sanitizer to watch: DEVICE D L R."""

from __future__ import annotations

import sys

import torch

from .. import scan
from .checks import compare_scan


def main() -> int:
    """Compare the scan with the reference in every type, for batches of 3 and 1; return 1 if one is off."""
    device, channels, length, rank = sys.argv[1], *map(int, sys.argv[2:])
    call = scan.Call(channels, length, rank)
    dtypes = (torch.float32, torch.bfloat16)
    results = [compare_scan(call, batch, dtype, device) for dtype in dtypes for batch in (3, 1)]
    sys.stdout.write("\n".join(map(str, results)) + "\n")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
