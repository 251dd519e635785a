"""One process is a group of its own; groups of two are in the trainer's tests."""

from __future__ import annotations

import os

import pytest
import torch

from util.distributed import (
    NCCL_VARIABLES,
    Process,
    choose_device,
    init_process,
    is_lost_process,
    lost_in_nccl,
    open_store,
)
from util.launch import Launch


def test_one_process_needs_no_group():
    with init_process(Launch(), device="cpu") as process:
        assert not torch.distributed.is_initialized()
        assert process == Process()
        assert process.is_logging
        assert process.sum([1, 2.5]) == [1.0, 2.5]
        assert process.gather_objects("mine") == ["mine"]
        assert process.broadcast_object("mine") == "mine"
        assert process.on_first(lambda: 7) == 7
        assert process.sum_tensor(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError])
def test_an_error_on_the_first_process_is_raised(kind):
    def fail():
        raise kind("reason")

    with pytest.raises(kind, match="reason"):
        Process().on_first(fail)


@pytest.mark.parametrize(
    ("name", "num_gpus", "local_rank", "expected"),
    [("auto", 0, 3, "cpu"), ("cpu", 2, 0, "cpu"), ("auto", 2, 1, "cuda:1"), ("cuda", 2, 0, "cuda:0")],
)
def test_devices(monkeypatch, name, num_gpus, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_device(name, local_rank=local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [("cuda", 0, "finds no GPU; use trainer.device=cpu"), ("auto", 2, "process 2 .* 2 found; start 2 per node")],
)
def test_a_gpu_that_is_not_there(monkeypatch, name, num_gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ValueError, match=message):
        choose_device(name, local_rank=2)


def test_which_errors_tell_of_a_lost_process():
    assert is_lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9424"))
    assert is_lost_process(RuntimeError("Application timeout caused pair closure"))
    assert is_lost_process(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost_process(RuntimeError("shapes cannot be multiplied"))
    assert not is_lost_process(ValueError("Connection closed by peer"))


def test_nccl_gives_up_after_the_alarm_and_keeps_its_record(monkeypatch):
    given = {}
    for name in NCCL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # what is set stays
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("util.distributed.open_store", lambda *_, **__: torch.distributed.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    launch = Launch(rank=1, local_rank=1, world_size=2)
    with init_process(launch, device="cuda", timeout_seconds=600) as process:
        assert process.alarm.seconds == 600 < given["timeout"].total_seconds()
        assert "flight record" in process.alarm.explain()
        with process.waiting():
            pass
    assert {name: os.environ[name] for name in NCCL_VARIABLES} == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }


def test_the_flight_record_goes_to_the_run_or_where_nobody_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    assert f"(NCCL's flight record: {run / 'nccl_flight_record_rank3.pickle'})" in lost_in_nccl(3, run)
    assert (run / "nccl_flight_record_rank3.pickle").read_bytes() == b"trace"
    assert lost_in_nccl(3) != lost_in_nccl(3)
    assert len(list(tmp_path.glob("nccl-*/nccl_flight_record_rank3.pickle"))) == 2


@pytest.mark.parametrize(
    ("nodes", "count", "is_shared", "expected"),
    [("1", "2", "True", "2"), ("1", "2", "False", "2"), ("2", "0", "True", "0"), ("2", "2", "False", "0")],
)
def test_each_attempt_of_a_launcher_meets_afresh(monkeypatch, tmp_path, nodes, count, is_shared, expected):
    monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", is_shared)
    store = open_store(Launch(dist_url=f"file://{tmp_path}/store"), timeout_seconds=5)
    store.set("key", "value")
    assert f"/attempt{expected}/key".encode() in (tmp_path / "store").read_bytes()


def test_a_restart_on_several_nodes_in_the_store_of_before_is_refused(monkeypatch, tmp_path):
    for name, value in (("GROUP_WORLD_SIZE", "2"), ("RESTART_COUNT", "1"), ("USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name if name.startswith("GROUP") else f"TORCHELASTIC_{name}", value)
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node"):
        open_store(Launch(dist_url=f"file://{tmp_path}/store"), timeout_seconds=5)
