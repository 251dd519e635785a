"""Train, test or use a classifier: ``python run.py -c CONFIG -m MODE [path.key=value ...]``."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from configs import load_config
from trainer import run_mode
from util.cli import parse_arguments
from util.distributed import init_process
from util.errors import exit_code_of
from util.launch import Launch, find_launch
from util.logging import setup_console


def run(arguments: argparse.Namespace, launch: Launch) -> int:
    """Do one run and return the exit code."""
    setup_console(is_logging=launch.is_logging, rank=launch.rank)
    config = load_config(arguments.config, arguments.overrides, mode=arguments.mode, world_size=launch.world_size)
    with init_process(launch, device=config.trainer.device, timeout_seconds=config.trainer.timeout_seconds) as process:
        return run_mode(config, process)


if __name__ == "__main__":
    parsed = parse_arguments()
    time.sleep(parsed.sleep)
    find = partial(find_launch, dist_url=parsed.dist_url, logging_rank=parsed.logger_rank)
    sys.exit(exit_code_of(find, partial(run, parsed)))
