"""The place of this process among those of a run, from the launcher's environment variables.

Supported are ``torchrun`` and ``torch.distributed.launch --use_env`` (RANK, WORLD_SIZE, LOCAL_RANK), ``srun``
(SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, the node list) and a plain ``python run.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Launch", "as_environment", "find_launch", "first_host"]

FIRST_SLURM_PORT = 12000
NUM_SLURM_PORTS = 20000


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The place of this process among those of the run.

    Attributes:
        rank: Number of this process over all nodes.
        local_rank: Number of this process on its node; picks the GPU.
        world_size: Number of processes over all nodes.
        dist_url: Where the processes meet; ``env://`` reads MASTER_ADDR and MASTER_PORT.
        logging_rank: The process that logs and writes.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    dist_url: str = "env://"
    logging_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} processes; look at RANK and WORLD_SIZE")
        if not 0 <= self.logging_rank < self.world_size:
            raise ValueError(
                f"--logger_rank {self.logging_rank} is not one of the ranks 0..{self.world_size - 1} of this run"
            )

    @property
    def is_logging(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == self.logging_rank


def find_launch(
    environment: Mapping[str, str] | None = None, *, dist_url: str = "env://", logging_rank: int = 0
) -> Launch:
    """Return this process's place, read from the launcher's variables.

    Args:
        environment: The variables; those of this process when None.
        dist_url: Where the processes meet: ``env://``, ``tcp://host:port`` or ``file:///shared/path``.
        logging_rank: The process that logs and writes.

    Raises:
        ValueError: If a variable is not a number, or the numbers contradict each other.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return Launch(
            rank=_integer(variables, "RANK"),
            local_rank=_integer(variables, "LOCAL_RANK", default=0),
            world_size=_integer(variables, "WORLD_SIZE"),
            dist_url=dist_url,
            logging_rank=logging_rank,
        )
    if "SLURM_PROCID" in variables and "SLURM_NTASKS" in variables:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
        return Launch(
            rank=_integer(variables, "SLURM_PROCID"),
            local_rank=_integer(variables, "SLURM_LOCALID", default=0),
            world_size=_integer(variables, tasks),
            dist_url=_slurm_url(variables) if dist_url == "env://" else dist_url,
            logging_rank=logging_rank,
        )
    return Launch(dist_url=dist_url, logging_rank=logging_rank)


def as_environment(launch: Launch) -> dict[str, str]:
    """Return the variables that ``torchrun`` would set for a process, for libraries that read no others."""
    places = {"RANK": launch.rank, "LOCAL_RANK": launch.local_rank, "WORLD_SIZE": launch.world_size}
    variables = {name: str(place) for name, place in places.items()}
    if launch.dist_url.startswith("tcp://"):
        host, _, port = launch.dist_url.removeprefix("tcp://").rpartition(":")
        variables |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    return variables


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    first = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", node_list)
    host = "".join(part or "" for part in first.groups()) if first else ""
    if not host:
        raise ValueError(
            f"SLURM node list {node_list!r} names no host; set MASTER_ADDR or give --dist_url tcp://HOST:PORT"
        )
    return host


def _slurm_url(variables: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in variables and "MASTER_PORT" in variables:
        return f"tcp://{variables['MASTER_ADDR']}:{_integer(variables, 'MASTER_PORT')}"
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    node_list = next((variables[name] for name in names if variables.get(name)), "localhost")
    host = variables.get("MASTER_ADDR") or first_host(node_list)
    job = _integer(variables, "SLURM_JOB_ID", default=0) + _integer(variables, "SLURM_STEP_ID", default=0)
    port = variables.get("MASTER_PORT") or FIRST_SLURM_PORT + job % NUM_SLURM_PORTS
    return f"tcp://{host}:{port}"


def _integer(variables: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"environment variable {name} is {text!r}, expected a whole number") from None
