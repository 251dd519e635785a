"""Jobs that lose processes and nodes resume in place, and end with the weights of a job that lost none."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trainer_cases import (
    CONFIG,
    REPOSITORY,
    TINY_NETWORK,
    assert_same,
    comparable,
    epoch_records,
    free_port,
    short_run,
)

from trainer.checkpoint import load_training_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("elastic.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--max-restarts=3")
AUTO = "trainer.resume_dir=auto"
PATIENCE = 200  # seconds; other tests may keep the cores


@dataclass
class Job:
    """Runs of one configuration in a folder of their own."""

    folder: Path
    data: Path
    overrides: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.marks = self.folder / "marks"
        self.marks.mkdir(parents=True)
        self.overrides = short_run(self.data, self.folder / "runs", *TINY_NETWORK, AUTO)

    def mark(self, place: str, text: str = "") -> Path:
        """Have a process stand still, or die, and return the file that tells that it is there."""
        (self.marks / place).write_text(text)
        return self.marks / f"{place}.reached"

    @property
    def run(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def torchrun(self, *options: str, prefix: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
        """Start a launcher with its processes in a group of their own."""
        return subprocess.Popen(
            [*prefix, *TORCHRUN, *options, str(SCRIPT), str(self.marks), "-c", CONFIG, "-m", "train", *self.overrides],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PET_MASTER_PORT": str(free_port()),
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def checkpoint(self) -> dict:
        return load_training_checkpoint(self.run / "latest_ckpt.pth")


def end(launcher: subprocess.Popen) -> None:
    """Kill a launcher and everything that it started, as the loss of its node does."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    ranks = [int(child) for child in children.read_text().split()] if children.exists() else []
    for process in (*ranks, launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.communicate(timeout=PATIENCE)


def wait_for(file: Path, *launchers: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline, f"nobody came to {file.name}"
        time.sleep(0.05)


def finish(*launchers: subprocess.Popen) -> list[str]:
    """Return what the launchers print until all of them succeed."""
    outputs = [launcher.communicate(timeout=PATIENCE)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(outputs)
    return outputs


@pytest.fixture
def job(class_folders, tmp_path):
    return Job(tmp_path, class_folders)


@pytest.fixture(scope="module")
def undisturbed(class_folders, tmp_path_factory):
    """The last checkpoint of a job of two processes on one node that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("undisturbed"), class_folders)
    finish(job.torchrun("--nproc_per_node=2"))
    return job.checkpoint()


def test_a_rank_that_is_killed_twice_changes_nothing(job, undisturbed):
    marks = [job.mark("2-1-3", "kill"), job.mark("2-1-5", "kill")]
    finish(job.torchrun("--nproc_per_node=2"))
    assert all(mark.exists() for mark in marks)
    assert_same(comparable(job.checkpoint()), comparable(undisturbed))
    text = (job.run / "log.txt").read_text()
    assert re.findall(r"resumes from .* iteration (\d)", text) == ["2", "4"]
    waits = re.findall(r"Epoch (\d): rank [01] on (\S+) waited longest for images, [\d.]+ s; the median is ", text)
    assert waits == [("1", socket.gethostname()), ("2", socket.gethostname())]
    assert [record["epoch"] for record in epoch_records(job.run)] == [1, 2]


@dataclass(frozen=True)
class Node:
    """A machine, or what stands for one.

    Attributes:
        address: Where the other reaches it.
        prefix: Runs a command there.
        environment: Of processes there.
    """

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two network namespaces joined by a cable; the machine itself twice where none can be made."""
    names = [f"node{number}-{os.getpid()}" for number in (0, 1)]
    with ExitStack() as stack:
        try:
            for name in names:
                _ip(f"netns add {name}")
                stack.callback(_ip, f"netns del {name}")
            _ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        except (OSError, subprocess.CalledProcessError):
            yield [Node(), Node()]
            return
        for number, name in enumerate(names):
            _ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev cable")
            for device in ("lo", "cable"):
                _ip(f"-n {name} link set {device} up")
        yield [
            Node(f"10.77.0.{number + 1}", ("ip", "netns", "exec", name), {"GLOO_SOCKET_IFNAME": "cable"})
            for number, name in enumerate(names)
        ]


@pytest.fixture
def start(job, nodes) -> Iterator[object]:
    """Start the agent of a node in a job of ``num_nodes``."""
    meeting = f"{nodes[0].address}:{free_port()}"
    with ExitStack() as stack:

        def start_agent(number: int, num_nodes: str) -> subprocess.Popen:
            node = nodes[number]
            options = (
                f"--nnodes={num_nodes}",
                "--nproc_per_node=1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={meeting}",
                f"--rdzv-conf=last_call_timeout=1,is_host={number == 0}",
                f"--local-addr={node.address}",
                "--monitor-interval=0.1",
            )
            # An agent that shares the processes' store does not tell one that joins later where it is.
            sharing = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            agent = job.torchrun(*options, prefix=node.prefix, **node.environment, **sharing)
            stack.callback(end, agent)
            return agent

        yield start_agent


def end_at(marks, agent, *others):
    """End an agent where all ranks have come to their marks, and take these away."""
    for mark in marks:
        wait_for(mark, *others, agent)
    end(agent)
    for mark in marks:
        mark.unlink()


def test_a_node_that_is_lost_and_joins_again_changes_nothing(job, start, undisturbed):
    """Two nodes of one process each give the gradients of one node of two."""
    lost = [job.mark(f"2-{rank}-5") for rank in (0, 1)]
    first, second = start(0, "2"), start(1, "2")
    end_at(lost, second, first)
    finish(first, start(1, "2"))
    assert_same(comparable(job.checkpoint()), comparable(undisturbed))
    assert "after 1 of 2 epochs and 1 steps, iteration 4" in (job.run / "log.txt").read_text()


def test_a_job_goes_on_with_fewer_nodes_until_they_are_back(job, start):
    marks = [job.mark(f"2-{rank}-2") for rank in (0, 1)]
    alone = job.mark("1-0-4")
    first, second = start(0, "1:2"), start(1, "1:2")
    end_at(marks, second, first)
    wait_for(alone, first)
    finish(first, start(1, "1:2"))
    text = (job.run / "log.txt").read_text()
    changes = re.findall(r"was saved with world_size=(\d), .*; the run resumes with world_size=(\d), ", text)
    assert changes == [("2", "1"), ("1", "2")]
    assert job.checkpoint()["iter"] == 6
    assert [record["epoch"] for record in epoch_records(job.run)] == [1, 2]


SRUN = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path

command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
Path(os.environ["SRUN_PID"]).write_text(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
"""


@pytest.fixture
def sbatch(class_folders, tmp_path):
    """Start the guide's script under stand-ins for srun, with two tasks, and scontrol."""
    guide = (REPOSITORY / "docs" / "scale.md").read_text(encoding="utf-8")
    script = tmp_path / "train.sbatch"
    script.write_text(
        next(block for block in re.findall(r"```bash\n(.*?)```", guide, flags=re.S) if "#SBATCH" in block)
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    short = [*short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, "epoch_full=20"), AUTO]
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])

    def submit() -> subprocess.Popen:
        (tmp_path / "srun.pid").unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment |= {"PATH": path, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"SRUN_PID": str(tmp_path / "srun.pid"), "SCONTROL_LOG": str(tmp_path / "scontrol.log")}
        return subprocess.Popen(
            ["bash", str(script), *short],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


def test_a_slurm_job_whose_time_is_over_is_queued_again_and_resumes(sbatch, tmp_path):
    job = sbatch()
    for line in job.stdout:
        if "Epoch 1:" in line:
            os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
            break
    output = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode == 138, output
    assert "stopped by SIGUSR1; the state is saved" in output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    (output,) = finish(sbatch())
    assert "resumes from" in output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    (folder,) = (tmp_path / "runs").iterdir()
    assert [record["epoch"] for record in epoch_records(folder)] == list(range(1, 21))
