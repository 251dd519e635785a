"""Train, test or use a classifier: ``python run.py -c CONFIG -m MODE [path.key=value ...]``."""

from __future__ import annotations

import sys
import time
from functools import partial

from util.cli import interruptible, parse_arguments
from util.waiting import sleep_while_waiting


def main() -> int:
    """Parse the command line, do the run and return the exit code."""
    parsed = parse_arguments()
    time.sleep(parsed.sleep)
    sleep_while_waiting()
    # PyTorch takes seconds to import: help comes without it, and Ctrl-C may come meanwhile.
    from configs import load_config
    from trainer import run_mode
    from util.distributed import init_process
    from util.errors import exit_code_of
    from util.launch import Launch, find_launch
    from util.logging import setup_console

    def run(launch: Launch) -> int:
        setup_console(is_logging=launch.is_logging, rank=launch.rank)
        config = load_config(parsed.config, parsed.overrides, mode=parsed.mode, world_size=launch.world_size)
        options = config.trainer
        with init_process(launch, device=options.device, timeout_seconds=options.timeout_seconds) as process:
            return run_mode(config, process)

    find = partial(find_launch, dist_url=parsed.dist_url, logging_rank=parsed.logger_rank)
    return exit_code_of(find, run)


if __name__ == "__main__":
    sys.exit(interruptible(main))
