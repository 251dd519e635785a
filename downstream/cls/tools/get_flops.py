"""Count a classifier's parameters and FLOPs: ``python tools/get_flops.py --help``, with the root in PYTHONPATH."""

import sys

from downstream.tools.get_flops import main

if __name__ == "__main__":
    sys.exit(main())
