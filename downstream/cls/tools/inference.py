"""Write a classifier's answer on an image: ``python tools/inference.py --help``, with the repository in PYTHONPATH."""

import sys

from downstream.tools.inference import main

if __name__ == "__main__":
    sys.exit(main())
