"""Number formats, and refusals that name the native counterpart."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from torch import nn

from configs.schema import Trainer
from trainer.batchnorm import convert_sync_batch_norm
from trainer.network import memory_format
from trainer.precision import ApexPrecision, Precision, build_precision
from trainer.train import train
from util.distributed import Process

CPU = torch.device("cpu")


@pytest.fixture
def fake_apex(monkeypatch):
    """An apex whose scaling multiplies by 1 and whose conversion marks the network."""
    apex, amp, parallel = (types.ModuleType(name) for name in ("apex", "apex.amp", "apex.parallel"))
    for module in (apex, amp, parallel):
        module.__spec__ = types.SimpleNamespace(name=module.__name__)
    apex.__path__ = []
    amp.calls = []
    amp.initialize = lambda *arguments, **options: amp.calls.append(options)
    amp.scale_loss = lambda loss, optimizer: contextlib.nullcontext(loss)
    amp.state_dict = lambda: {"loss_scaler0": {"loss_scale": 1.0, "unskipped": 0}}
    parallel.convert_syncbn_model = lambda network: nn.Sequential(network)
    for module in (apex, amp, parallel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return amp


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"scaler": "none"}, "float32"),
        ({"scaler": "native"}, "float32"),
        ({"scaler": "native", "amp_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_precision_on_a_cpu(entries, text):
    assert str(build_precision(Trainer(**entries), CPU)) == text


def test_float16_on_a_cpu_says_why_not(caplog):
    caplog.set_level("INFO")
    build_precision(Trainer(scaler="native"), CPU)
    assert "float16 needs a GPU" in caplog.text


def test_autocast_computes_in_the_named_format():
    linear = nn.Linear(4, 4)
    for precision, dtype in ((Precision(CPU), torch.float32), (Precision(CPU, torch.bfloat16), torch.bfloat16)):
        with precision.autocast():
            assert linear(torch.ones(1, 4)).dtype is dtype


def test_apex_is_refused_with_the_native_choice_named():
    with pytest.raises(ValueError, match=r"trainer.scaler=apex.*not installed.*trainer.scaler=native"):
        build_precision(Trainer(scaler="apex"), CPU)
    with pytest.raises(ValueError, match=r"trainer.sync_BN=apex.*not installed.*trainer.sync_BN=native"):
        convert_sync_batch_norm(nn.BatchNorm2d(2), "apex", Process())


def test_apex_is_taken_where_it_is(fake_apex):
    precision = build_precision(Trainer(scaler="apex"), CPU)
    assert isinstance(precision, ApexPrecision)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    precision.prepare(nn.Identity(), optimizer)
    precision.backward(2 * parameter.sum(), optimizer)
    precision.step(optimizer)
    assert parameter.item() == 0
    assert fake_apex.calls == [{"opt_level": "O1", "verbosity": 0}]
    assert precision.state_dict() == fake_apex.state_dict()
    assert isinstance(convert_sync_batch_norm(nn.BatchNorm2d(2), "apex", Process()), nn.Sequential)


def test_sync_batch_norm_needs_gpus():
    process = Process(world_size=2, backend="gloo")
    with pytest.raises(ValueError, match=r"sync_BN=native needs GPUs.*sync_BN=none"):
        convert_sync_batch_norm(nn.BatchNorm2d(2), "native", process)
    network = nn.BatchNorm2d(2)
    assert convert_sync_batch_norm(network, "none", process) is network
    assert convert_sync_batch_norm(network, "native", Process()) is network  # one process shares with itself


def test_sync_batch_norm_on_gpus():
    process = Process(world_size=2, device=torch.device("cuda", 0), backend="nccl")
    converted = convert_sync_batch_norm(nn.Sequential(nn.BatchNorm2d(2)), "native", process)
    assert isinstance(converted[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_channels_last_and_bfloat16_train(build, dtype):
    run = build("trainer.channels_last=true", f"trainer.amp_dtype={dtype}", "epoch_full=1", "warmup_epochs=0")
    assert run.network.conv_head.weight.is_contiguous(memory_format=torch.channels_last)
    assert train(run) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_a_compiled_network_trains_as_the_plain_one(finish):
    short = ("epoch_full=1", "warmup_epochs=0", "model.model_kwargs.extra.drop_rate=0.0")
    _, plain = finish(*short)
    _, compiled = finish(*short, "trainer.compile=true")
    assert list(plain["net"]) == list(compiled["net"])
    for name, value in plain["net"].items():
        torch.testing.assert_close(value, compiled["net"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("entry", "device", "expected"),
    [
        (None, "cuda", torch.channels_last),
        (None, "cpu", torch.contiguous_format),
        (False, "cuda", torch.contiguous_format),
        (True, "cpu", torch.channels_last),
    ],
)
def test_images_are_channels_last_on_gpus_unless_told_otherwise(entry, device, expected):
    assert memory_format(Trainer(channels_last=entry), torch.device(device)) is expected
