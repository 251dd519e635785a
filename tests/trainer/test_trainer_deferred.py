"""Steps that decide on the device whether they are done: nothing waits, and nothing else is different."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trainer_cases import assert_same

from configs import load_config
from loss import build_loss, build_mixup
from model import create_model
from optim import build_optimizer
from trainer.average import WeightAverage
from trainer.batchnorm import StatisticsKeeper
from trainer.checkpoint import load_training_checkpoint
from trainer.precision import Precision
from trainer.step import Objective, Stepper
from trainer.stop import WATCHED, SignalWatch
from trainer.train import train
from util.distributed import Process
from util.errors import RunError

LONGER = ("batch_size=2", "logging.train_log_per=50", "logging.train_reset_log_per=50")  # 12 steps an epoch
CPU = torch.device("cpu")


@pytest.fixture
def build_deferred(build):
    """Set up a run that defers on a CPU, as on a GPU."""

    def make(*more: str):
        run = build(*LONGER, *more)
        assert run.stepper.precision.can_skip_by_itself(run.optimizer)
        run.stepper.is_deferred = True
        return run

    return make


def spoil(run, *, loss: set[int] = frozenset(), gradient: set[int] = frozenset()) -> None:
    """Make the loss or the gradient of some steps, counted from 1, something that is not finite."""
    compute_loss = run.stepper.compute_loss

    def spoiling(images: Tensor, targets: Tensor):
        step = run.state.iteration + 1
        value, terms = compute_loss(images * (float("nan") if step in loss else 1.0), targets)
        if step in gradient:
            value = value + torch.sqrt((value - value.detach()).abs())  # 0, with an infinite slope
        return value, terms

    run.stepper.compute_loss = spoiling


def test_a_deferred_run_is_the_same_run(build, build_deferred):
    """Bit for bit; but for the average, which is moved in three operations instead of one."""
    ends = []
    for make in (lambda: build(*LONGER), build_deferred):
        run = make()
        spoil(run, loss={3, 4, 7}, gradient={9, 12})
        assert train(run) == 0
        assert run.state.skipped_steps == 5
        ends.append(load_training_checkpoint(run.folder / "latest_ckpt.pth"))
    expected, actual = ends
    for entry in ("net", "scheduler", "scores", "iter", "class_names"):
        assert_same(actual[entry], expected[entry], entry)
    assert_same(actual["optimizer"]["state"], expected["optimizer"]["state"])
    assert_same(actual["rng"][0]["meters"]["epoch"], expected["rng"][0]["meters"]["epoch"])
    for name, value in expected["net_E"].items():
        torch.testing.assert_close(actual["net_E"][name], value, rtol=1e-5, atol=1e-7)


def test_results_come_a_step_later(build_deferred):
    run = build_deferred()
    settled, settle = [], run.stepper.settle

    def note(result):
        settle(result)
        settled.append(run.state.iteration)

    run.stepper.settle = note
    assert train(run) == 0
    # At once: after 1, 2, 4, ... steps, which are saved, and at the end of the two epochs.
    assert settled == [1, 2, 4, 4, 6, 7, 8, 8, 10, 11, 12, 12, 14, 15, 16, 16, *range(18, 25), 24]


def test_bad_steps_in_a_row_stop_the_run_one_step_later(build_deferred):
    run = build_deferred("trainer.max_bad_steps=2")
    spoil(run, loss={5, 6})
    with pytest.raises(RunError, match=r"2 steps in a row.*the loss is not finite.*saved in"):
        train(run)
    checkpoint = load_training_checkpoint(run.folder / "latest_ckpt.pth")
    assert (checkpoint["iter"], checkpoint["progress"]["skipped_steps"]) == (7, 2)
    assert checkpoint["progress"]["bad_steps"] == 0  # the seventh was a good one
    assert all(value.isfinite().all() for value in checkpoint["net"].values())


def test_a_stopped_run_resumes_bit_for_bit(build_deferred):
    whole = build_deferred()
    assert train(whole) == 0
    stopped = build_deferred()
    compute_loss = stopped.stepper.compute_loss

    def signalling(images: Tensor, targets: Tensor):
        if stopped.state.iteration == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(images, targets)

    stopped.stepper.compute_loss = signalling
    assert train(stopped) == 143
    assert stopped.state.iteration == 7
    resumed = build_deferred(f"trainer.resume_dir={stopped.folder}")
    assert train(resumed) == 0
    expected, actual = (load_training_checkpoint(run.folder / "latest_ckpt.pth") for run in (whole, resumed))
    for entry in ("net", "net_E", "optimizer", "scheduler", "scaler", "scores", "iter"):
        assert_same(actual[entry], expected[entry], entry)
    assert_same(actual["rng"][0]["meters"]["epoch"], expected["rng"][0]["meters"]["epoch"])


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale(build_deferred):
    run = build_deferred()
    precision = Precision(CPU, torch.float16)
    precision.autocast = run.precision.autocast
    run.stepper.precision = precision
    spoil(run, loss={1})
    scale = precision.scaler.get_scale()
    result = run.stepper(run.loaders.train.iterate(0))
    run.stepper.settle(result)
    assert (result.is_skipped, result.is_bad, result.cause) == (True, True, "the loss is not finite")
    assert precision.scaler.get_scale() == scale


GRADIENTS = {"finite": 1.0, "overflow": float("inf"), "norm-overflow": 3e38, "nan": float("nan")}


@pytest.mark.parametrize("scale", [2.0**16, 1.0], ids=["large-scale", "smallest-scale"])
@pytest.mark.parametrize("is_loss_finite", [True, False])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_device_decides_as_the_host(kind, is_loss_finite, scale):
    """On the step, the loss scale and what is to blame: the scale for an overflow, and for nothing else."""
    outcomes = []
    for is_deferred in (False, True):
        precision = Precision(CPU, torch.float16)
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([parameter], fused=True)
        precision.backward(parameter.sum(), optimizer)
        parameter.grad.fill_(GRADIENTS[kind])
        if kind == "norm-overflow":
            parameter.grad.mul_(1 / scale).mul_(scale)  # finite with its scale and without
            precision.scaler.unscale_(optimizer)
            parameter.grad.fill_(GRADIENTS[kind])
        else:
            precision.unscale(optimizer)
        is_norm_finite = bool(parameter.grad.norm().isfinite())
        is_good = is_norm_finite and is_loss_finite
        if is_deferred:
            flags = [torch.tensor(not is_loss_finite), torch.tensor(not is_good)]
            is_bad = bool(precision.step_unless(optimizer, *flags))
        elif is_good:
            precision.step(optimizer)
            is_bad = False
        else:
            is_bad = not precision.skip(optimizer, is_overflow=is_loss_finite)
        state = precision.scaler.state_dict()
        outcomes.append((is_bad, state["scale"], state["_growth_tracker"], parameter.tolist()))
    assert outcomes[0] == outcomes[1]
    is_bad, new_scale, _, values = outcomes[0]
    is_blamed = kind in ("overflow", "nan") and is_loss_finite
    is_good = kind == "finite" and is_loss_finite
    assert new_scale == scale * (2.0 if is_good else 0.5 if is_blamed else 1.0)
    assert is_bad == (not is_good and not (is_blamed and scale > 1))
    assert (values == [1.0, 1.0]) == (not is_good)


@pytest.mark.parametrize("is_skipped", [True, False])
def test_statistics_and_average_follow_the_device(is_skipped):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    average, expected = (WeightAverage(network, decay=0.9) for _ in range(2))
    keeper = StatisticsKeeper(network)
    keeper.keep()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(torch.randn(2, 3, 4, 4) * (float("nan") if is_skipped else 1.0))
    after = before if is_skipped else {name: value.clone() for name, value in network.state_dict().items()}
    keeper.restore_if(torch.tensor(is_skipped))
    assert_same(dict(network.state_dict()), after)
    average.update_unless(network, torch.tensor(is_skipped))
    if not is_skipped:
        expected.update(network)
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(average.module.state_dict()[name], value, rtol=0 if is_skipped else 1e-6, atol=0)


def test_gradients_never_wait_for_a_gpu(monkeypatch):
    """Mixup, network, loss and backward pass, on tensors whose values cannot be asked for."""
    for module in ("layers", "mobilemamba.wavelet", "mobilemamba.mobilemamba"):
        monkeypatch.setattr(f"model.{module}.is_on_gpu", lambda _: True)
    config = load_config("configs/mobilemamba/mobilemamba_t2", ["trainer.device=cpu", "nb_classes=5"])
    network = create_model("MobileMamba_T2", num_classes=5).train().to("meta")
    objective = Objective(network=network, loss=build_loss(config), mixup=build_mixup(config))
    images = torch.empty(2, 3, 64, 64, device="meta")
    loss, terms = objective(images, torch.empty(2, dtype=torch.long, device="meta"))
    loss.backward()
    assert all(term.is_meta for term in terms.values())
    assert all(parameter.grad.is_meta for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None], ids=str)
def test_a_step_never_waits_for_a_gpu(dtype, monkeypatch):
    """From the gradients on, on fake CUDA tensors: unscaling, clipping, agreement, optimiser, statistics, average."""
    config = load_config("configs/mobilemamba/mobilemamba_t2", ["trainer.device=cpu", "nb_classes=5"])
    network = create_model("MobileMamba_T2", num_classes=5, depth=(1, 0, 0)).train()
    average = WeightAverage(network, decay=0.9)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr("trainer.step._Readback", lambda values: values)
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to(device)
        average.to(device)
        optimizer = build_optimizer(config, network)
        assert optimizer.defaults["fused"]
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        precision = Precision(device, None if dtype is None else getattr(torch, dtype))
        stepper = Stepper(
            config,
            Process(device=device),
            network=network,
            parallel=None,
            optimizer=optimizer,
            average=average,
            precision=precision,
            compute_loss=lambda images, targets: (images, {}),
            watch=SignalWatch(),
        )
        assert stepper.is_deferred
        loss = torch.zeros((), device=device)
        if precision.scaler is not None:
            precision.scaler.scale(loss)
        stepper._accumulate = lambda *_, **__: loss
        result = stepper(iter([]))
    assert result.pending.shape == (3 + len(WATCHED) + 1,)
