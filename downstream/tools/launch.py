"""torchrun, with the exit code of the process that failed and without its own traceback.

``python -m downstream.tools.launch [options of torchrun] SCRIPT [arguments]``
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from util.errors import EXIT_FAILED, EXIT_USER_ERROR

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run torchrun and return the exit code of the process that failed first, 128 + signal when stopped, or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (EXIT_FAILED, EXIT_USER_ERROR):  # with these, the process has said why itself
            ending = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"error: process {rank} ended with {ending}; its output is above", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
