"""Test a detector: ``python tools/test.py --help``, with the repository's root in PYTHONPATH."""

import sys

from downstream.tools.test import main

if __name__ == "__main__":
    sys.exit(main())
