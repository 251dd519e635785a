"""Train a detector: ``python tools/train.py --help``, with the repository's root in PYTHONPATH."""

import sys

from downstream.tools.train import main

if __name__ == "__main__":
    sys.exit(main())
