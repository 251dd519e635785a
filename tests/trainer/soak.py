"""Endurance: a run of two processes that is disturbed at random ends with the weights of one that is left alone.

``make soak`` takes 20 minutes and as long again as the undisturbed run takes. Every few seconds one of these happens:
a process gets SIGTERM or SIGKILL, is stopped by SIGSTOP for a while or for good, or may write no file of a checkpoint's
size any more, which stands for a full disk; or the launcher is killed together with them. torchrun restarts what fails,
this script what was killed with its launcher, always with ``trainer.resume_dir=auto``. Some training images are corrupt
from the start, in both runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainer_cases import CONFIG, REPOSITORY, TINY_NETWORK, assert_same, free_port, short_run, write_class_folders

from trainer.checkpoint import LATEST, load_training_checkpoint

MAX_RESTARTS = 10_000
TIMEOUT_SECONDS = 10  # after which a process takes another, which stands still, for lost
PAUSES = (4.0, 20.0)  # seconds between two faults
FILE_LIMIT = 100_000  # bytes: logs still fit, checkpoints do not
COMPARED = ("net", "net_E", "optimizer", "iter", "epoch", "scores")


class Launcher:
    """torchrun with two processes of one run.

    Args:
        arguments: Of run.py.
        log: File that takes what they print.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += [f"--max-restarts={MAX_RESTARTS}", "run.py", "-c", CONFIG, "-m", "train", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port())}
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Return the ids of its processes that are there now."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return [int(child) for child in children.split()]
        return []

    def kill(self) -> None:
        """Kill it and all of its processes."""
        _send(self.process.pid, signal.SIGSTOP)  # it starts no other meanwhile
        for process in (*self.ranks(), self.process.pid):
            _send(process, signal.SIGKILL)
        self.process.wait()


def disturb(launcher: Launcher, draw: random.Random) -> str:
    """Do one harm, chosen at random; return its name."""
    ranks = launcher.ranks()
    kind = draw.choice(["SIGTERM", "SIGKILL", "SIGSTOP", "SIGSTOP, SIGCONT", "full disk", "all killed"])
    if kind == "all killed" or not ranks:
        launcher.kill()
        return "all killed"
    victim = draw.choice(ranks)
    if kind == "full disk":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            for rank in ranks:
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        return kind
    first, *then = kind.split(", ")
    _send(victim, getattr(signal, first))
    for name in then:
        time.sleep(draw.uniform(0, TIMEOUT_SECONDS / 2))
        _send(victim, getattr(signal, name))
    return kind


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def run_disturbed(arguments: Sequence[str], log: Path, *, seconds: float, seed: int) -> Counter[str]:
    """Do a run under faults for a time, then let it end; return how many there were of each kind."""
    draw, faults = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    launcher = Launcher(arguments, log)
    while launcher.process.poll() != 0:
        if launcher.process.poll() is not None:
            launcher = Launcher(arguments, log)
        if time.monotonic() > end:
            launcher.process.wait()
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.process.wait(draw.uniform(*PAUSES))
            continue
        faults[disturb(launcher, draw)] += 1
    return faults


def spoil_images(data: Path, *, count: int = 3) -> None:
    """Cut some training images short."""
    for path in sorted((data / "train").rglob("*.png"))[:: -(-24 // count)]:
        path.write_bytes(path.read_bytes()[:100])


def main(given: Sequence[str] | None = None) -> int:
    """Do both runs and compare them; return 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="takes the data and the runs; must not exist")
    parser.add_argument("--minutes", type=float, default=20, help="of faults")
    parser.add_argument("--epochs", type=int, default=400, help="of three steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args(given)
    data = write_class_folders(options.folder / "data")
    spoil_images(data)

    def arguments(name: str) -> list[str]:
        more = (f"epoch_full={options.epochs}", "trainer.resume_dir=auto", f"trainer.timeout_seconds={TIMEOUT_SECONDS}")
        test = ("trainer.test_per_epoch=50", f"test_start_epoch={options.epochs}", "trainer.save_per_epoch=1000")
        return short_run(data, options.folder / name, *TINY_NETWORK, *more, *test)

    start = time.monotonic()
    reference = Launcher(arguments("undisturbed"), options.folder / "undisturbed.txt")
    if reference.process.wait() != 0:
        print(f"the undisturbed run failed: see {options.folder / 'undisturbed.txt'}")
        return 1
    alone = time.monotonic() - start
    log = options.folder / "disturbed.txt"
    faults = run_disturbed(arguments("disturbed"), log, seconds=60 * options.minutes, seed=options.seed)
    total = time.monotonic() - start - alone

    expected, found = (_last_checkpoint(options.folder / name) for name in ("undisturbed", "disturbed"))
    resumes = re.findall(r"resumes from .* iteration (\d+)", log.read_text(errors="replace"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items()))
    print(f"{expected['iter']} steps: undisturbed in {alone:.0f} s, disturbed in {total:.0f} s")
    print(f"{sum(faults.values())} faults ({kinds}); resumed {len(resumes)} times")
    for name in COMPARED:
        assert_same(found[name], expected[name], name)
    print("weights, averages, optimiser and scores are equal bit for bit")
    return 0


def _last_checkpoint(runs: Path) -> dict:
    (path,) = runs.glob(f"*/{LATEST}")  # a run that is killed at once leaves an empty folder
    return load_training_checkpoint(path)


if __name__ == "__main__":
    sys.exit(main())
