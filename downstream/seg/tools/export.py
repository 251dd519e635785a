"""Write a segmentor as an ONNX file: ``python tools/export.py --help``, with the repository's root in PYTHONPATH."""

import sys

from downstream.tools.export import main

if __name__ == "__main__":
    sys.exit(main())
