"""The processes of a run: NCCL between GPUs, as mmengine sets it up, and gloo between CPUs, which it does not."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner

from util.cores import count_cores, describe_threads, limit_threads
from util.launch import as_environment, find_launch

from .errors import InputError

__all__ = ["build_runner", "leave_processes", "log_once", "prepare_processes"]

SYNCHRONISED = ("SyncBN", "MMSyncBN")
TIMEOUT_SECONDS = 1800

logger = logging.getLogger(__name__)


def prepare_processes(config: Config, launcher: str) -> None:
    """Choose devices; without a GPU, join the process group and change what needs one in the configuration.

    With GPUs, the runner joins the group.

    Args:
        config: Changed in place.
        launcher: ``none``, ``pytorch`` or ``slurm``.

    Raises:
        InputError: There are fewer GPUs than processes, or SLURM has not started this one.
    """
    config.launcher = launcher
    if launcher == "slurm":
        if "SLURM_PROCID" not in os.environ:
            raise InputError("--launcher slurm: SLURM has not started this process; use tools/slurm_train.sh, or srun")
        os.environ.update(as_environment(find_launch()))  # for mmengine and the process group
    if torch.cuda.is_available():
        local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise InputError(
                f"process {local_rank} of this node has no GPU of its own: {num_devices} found; start {num_devices}, "
                "or set CUDA_VISIBLE_DEVICES to more (to nothing for the CPU)"
            )
        return
    config.setdefault("env_cfg", ConfigDict())
    config.env_cfg.dist_cfg = ConfigDict(backend="gloo")
    config.sync_bn = None
    num_replaced = sum(_replace_synchronised(node) for node in _mappings(config.model))
    if num_replaced and os.environ.get("RANK", "0") == "0":
        logger.warning("no GPU, and synchronised batch norms have no CPU kernel: %d made plain", num_replaced)
    if launcher == "none":
        return
    # The runner's default passes DDP the number of a GPU.
    config.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=config.get("find_unused_parameters", False),
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))


def build_runner(config: Config) -> Runner:
    """Return the runner, with no more threads than cores; its log says how many, and why."""
    cores = count_cores()
    limit_threads(cores)
    threads = describe_threads(cores)  # before the runner sets OMP_NUM_THREADS for the processes that it starts
    runner = Runner.from_cfg(config)
    runner.logger.info("%s", threads)
    return runner


def log_once(hooks: list[Hook]) -> None:
    """Take mmengine's logger out of a runner's hooks, in all processes but the first.

    Each would write the figures of a test to the same file, all at once.
    """
    if not is_main_process():
        hooks[:] = [hook for hook in hooks if not isinstance(hook, LoggerHook)]


def leave_processes() -> None:
    """Leave the process group, if there is one, once the run is over and its runner is released.

    A thread of gloo that is still busy while Python exits would abort the process.
    """
    if dist.is_initialized():
        gc.collect()  # the runner has reference cycles, and what holds the group keeps its threads alive
        dist.destroy_process_group()


def _mappings(node: Any) -> Iterator[MutableMapping[str, Any]]:
    if isinstance(node, MutableMapping):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _mappings(value)


def _replace_synchronised(node: MutableMapping[str, Any]) -> bool:
    is_layer, is_switch = node.get("type") in SYNCHRONISED, bool(node.get("sync_bn"))
    if is_layer:
        node["type"] = "BN"
    if is_switch:
        node["sync_bn"] = False
    return is_layer or is_switch
