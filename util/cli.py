"""The command line of run.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

__all__ = ["EXIT_INTERRUPTED", "interruptible", "parse_arguments"]

EXIT_INTERRUPTED = 130  # 128 and the number of SIGINT, as a shell reports it

EPILOG = """\
examples:
  one process, GPU if there is one:
    python run.py -c configs/mobilemamba/mobilemamba_t2 -m train data.root=/data/imagenet
  eight GPUs:
    torchrun --nproc_per_node=8 run.py -c configs/mobilemamba/mobilemamba_t2 -m train
  test a checkpoint:
    python run.py -c configs/mobilemamba/mobilemamba_t2 -m test model.model_kwargs.checkpoint_path=net.pth
  fine-tune it on folders of images, one a class, under images/train and images/val:
    python run.py -c configs/mobilemamba/finetune -m ft data.root=images model.model_kwargs.checkpoint_path=net.pth
  classify images (a file, a folder or a glob):
    python run.py -c configs/mobilemamba/mobilemamba_t2 -m predict model.model_kwargs.checkpoint_path=net.pth \\
        predict.input=photos predict.output=photos.json predict.sheet=photos.png
  resume a run that was stopped:
    python run.py -c configs/mobilemamba/mobilemamba_t2 -m train trainer.resume_dir=runs/mobilemamba/RUN

Every entry is in configs/schema.py. Exit codes: 0 done, 1 failed, 2 bad input, 128 + signal number when stopped by
SIGTERM (143), SIGINT (130), SIGUSR1 (138) or SIGHUP (129), after the state has been saved. A second Ctrl-C ends a run
at once, as where a read hangs.
"""


def interruptible(main: Callable[[], int]) -> int:
    """Return the exit code of a program; where Ctrl-C ends it, say so in one line and return 130."""
    try:
        return main()
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted before there was anything to save", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``sys.argv`` when ``arguments`` is None.

    Returns:
        ``config``, ``mode``, ``logger_rank``, ``dist_url``, ``sleep`` (seconds) and ``overrides``.
    """
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Train, fine-tune or test a classifier, or classify images with it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", required=True, help="a config file, with or without .py")
    parser.add_argument(
        "-m",
        "--mode",
        default="train",
        choices=("train", "ft", "test", "test_net", "predict"),
        help="train; ft: fine-tune a checkpoint; test: net and EMA weights; test_net: plain weights only; "
        "predict: classify images",
    )
    parser.add_argument("--logger_rank", type=int, default=0, metavar="R", help="the process that logs and writes")
    parser.add_argument(
        "--dist_url", default="env://", metavar="URL", help="where processes meet: env://, tcp://HOST:PORT, file://PATH"
    )
    parser.add_argument("--sleep", type=float, default=0.0, metavar="S", help="wait S seconds before the run")
    parser.add_argument("overrides", nargs="*", metavar="path.key=value", help="override a config entry")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.sleep < 0:
        parser.error(f"--sleep is {parsed.sleep}, expected seconds >= 0")
    return parsed
