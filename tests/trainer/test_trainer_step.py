"""One optimiser step: when it is skipped, and that micro-batches add up."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import nn
from trainer_cases import assert_same, epoch_records, write_class_folders

from data import Batch
from trainer.checkpoint import load_training_checkpoint
from trainer.precision import Precision
from trainer.stop import WATCHED
from trainer.train import train
from util.errors import RunError

PLAIN_NETWORK = ("model.model_kwargs.extra.drop_rate=0.0", "trainer.mixup_kwargs.prob=0")


def snapshot(run) -> dict:
    return copy.deepcopy(
        {
            "net": run.network.state_dict(),
            "net_E": run.average.module.state_dict(),
            "optimizer": run.optimizer.state_dict(),
        }
    )


def spoil(run, steps: set[int], value: float = float("nan")):
    """Make the loss of some steps, counted from 1, that value; return the list of states before each step."""
    compute_loss = run.stepper.compute_loss
    states = []

    def spoiling(images, targets):
        states.append(snapshot(run))
        loss, terms = compute_loss(images * (value if len(states) in steps else 1.0), targets)
        return loss, terms

    run.stepper.compute_loss = spoiling
    return states


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(build, value):
    run = build("trainer.save_per_epoch=1")
    states = spoil(run, {2}, value)
    assert train(run) == 0
    before, after = states[1], states[2]  # of steps 2 and 3
    (
        before["optimizer"].pop("param_groups"),
        after["optimizer"].pop("param_groups"),
    )  # with the learning rate
    assert_same(before, after)
    assert not torch.equal(states[3]["net"]["conv_stem.weight"], after["net"]["conv_stem.weight"])
    assert run.state.skipped_steps == 1
    assert epoch_records(run.folder)[0]["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in run.network.state_dict().values())


@pytest.mark.parametrize(
    "clipping",
    [
        ("loss.clip_grad=none",),
        *((f"loss.clip_mode={mode}", "loss.clip_grad=0.01") for mode in ("norm", "value", "agc")),
    ],
    ids=["none", "norm", "value", "agc"],
)
def test_a_finite_loss_with_a_gradient_that_is_not(build, clipping):
    run = build(*clipping)
    compute_loss = run.stepper.compute_loss

    def spoiling(images, targets):
        loss, terms = compute_loss(images, targets)
        return loss + torch.sqrt((loss - loss.detach()).abs()), terms  # of 0, with an infinite slope

    run.stepper.compute_loss = spoiling
    before = snapshot(run)
    result = run.stepper(run.loaders.train.iterate(0))
    assert (result.is_skipped, result.is_bad, result.cause) == (True, True, "the loss is finite, its gradient is not")
    assert_same(snapshot(run), before)


def test_too_many_bad_steps_in_a_row_stop_the_run(build):
    run = build("trainer.max_bad_steps=2")
    spoil(run, {2, 4, 5})
    with pytest.raises(RunError, match=r"2 steps in a row.*saved in.*latest_ckpt"):
        train(run)
    checkpoint = load_training_checkpoint(run.folder / "latest_ckpt.pth")
    assert checkpoint["iter"] == 5
    assert checkpoint["progress"]["skipped_steps"] == 3
    assert all(value.isfinite().all() for value in checkpoint["net"].values())


def test_micro_batches_add_up_to_the_large_batch(build):
    """On a network without BatchNorm, whose statistics are the batch's."""
    losses: list[torch.Tensor] = []

    def gradients(*more: str) -> list[torch.Tensor]:
        run = build(*PLAIN_NETWORK, "loss.clip_grad=none", "trainer.scaler=none", *more)
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
        run.stepper.compute_loss.network = linear
        taken = []
        run.stepper.parameters = list(linear.parameters())
        run.stepper.average = None
        run.optimizer.step = lambda: taken.extend(parameter.grad.clone() for parameter in linear.parameters())
        result = run.stepper(iter(run.loaders.train.iterate(0)))
        assert result.num_images == 8
        assert 0 < result.seconds["data_t"] < result.seconds["batch_t"]
        assert result.seconds["optim_t"] == pytest.approx(result.seconds["batch_t"] - result.seconds["data_t"])
        losses.append(result.terms["CE"])
        return taken

    whole = gradients("trainer.accumulation_steps=1")
    parts = gradients("trainer.accumulation_steps=4")
    assert len(whole) == 2
    for left, right in zip(whole, parts, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("mode", "clip"), [("norm", 0.01), ("value", 0.001), ("agc", 0.01)])
def test_gradients_are_clipped(build, mode, clip):
    run = build(*PLAIN_NETWORK, f"loss.clip_mode={mode}", f"loss.clip_grad={clip}")
    free = build(*PLAIN_NETWORK, "loss.clip_grad=none")
    seen = {}
    for name, one in (("clipped", run), ("free", free)):
        one.optimizer.step = lambda name=name, one=one: seen.update(
            {name: [parameter.grad.clone() for parameter in one.network.parameters()]}
        )
        one.stepper(one.loaders.train.iterate(0))
    norm = torch.nn.utils.get_total_norm(seen["clipped"])
    assert norm < torch.nn.utils.get_total_norm(seen["free"])
    if mode == "norm":
        torch.testing.assert_close(norm, torch.tensor(clip), rtol=1e-3, atol=0)
    if mode == "value":
        assert max(gradient.abs().max() for gradient in seen["clipped"]) == pytest.approx(clip)
    if mode == "agc":  # the classifier is left alone
        names = [name for name, _ in run.network.named_parameters()]
        head = names.index("classifier.weight")
        assert torch.equal(seen["clipped"][head], seen["free"][head])


def test_an_overflow_lowers_the_scale_and_is_no_bad_step(build):
    run = build()
    precision = Precision(torch.device("cpu"), torch.float16)  # its scaler works on a CPU as well
    precision.autocast = run.precision.autocast
    run.stepper.precision = precision
    compute_loss = run.stepper.compute_loss

    def overflowing(images, targets):
        loss, terms = compute_loss(images, targets)
        return loss + (loss - loss.detach()) * (3e38 if run.state.iteration < 2 else 0.0), terms

    run.stepper.compute_loss = overflowing
    scale = precision.scaler.get_scale()
    assert train(run) == 0
    assert run.state.skipped_steps == 2
    assert run.state.bad_steps == 0
    assert precision.scaler.get_scale() == scale / 4


def test_an_overflow_at_a_tiny_scale_is_bad():
    precision = Precision(torch.device("cpu"), torch.float16)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def overflow() -> bool:
        precision.backward((parameter * float("inf")).sum(), optimizer)
        precision.unscale(optimizer)
        return precision.skip(optimizer, is_overflow=True)

    blamed = [overflow() for _ in range(18)]
    assert blamed == [True] * 16 + [False] * 2  # 2**16 halves to 1 in sixteen steps
    assert parameter.item() == 1


def test_finite_gradients_whose_norm_is_not_are_bad():
    """Else the run would skip such steps for ever."""
    precision = Precision(torch.device("cpu"), torch.float16)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scale = precision.scaler.get_scale()
    for _ in range(3):
        precision.backward((parameter * 3e38 / scale).sum(), optimizer)
        parameter.grad.fill_(3e38)
        precision.unscale(optimizer)
        parameter.grad.fill_(3e38)
        assert not torch.linalg.vector_norm(parameter.grad).isfinite()
        assert not precision.skip(optimizer, is_overflow=True)
        optimizer.zero_grad()
    assert precision.scaler.get_scale() == scale


def test_a_loss_that_is_not_finite_leaves_the_scale():
    precision = Precision(torch.device("cpu"), torch.float16)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scale = precision.scaler.get_scale()
    for _ in range(3):
        precision.backward((parameter * float("nan")).sum(), optimizer)
        precision.unscale(optimizer)
        assert not precision.skip(optimizer, is_overflow=False)
    assert precision.scaler.get_scale() == scale


def test_unreadable_training_images_are_counted_once_and_capped(build, caplog):
    run = build("data.max_unreadable=1")
    iterate = run.loaders.train.iterate
    names = iter([["a.png"], ["a.png"], [], ["a.png", "b.png"]])

    def reporting(epoch, start_batch=0):
        for batch in iterate(epoch, start_batch):
            yield Batch(batch.images, batch.targets, next(names))

    run.loaders.train.iterate = reporting
    with pytest.raises(
        RunError, match=r"2 training images cannot be read, more than data.max_unreadable=1: a.png, b.png"
    ):
        train(run)
    counts = ("1 training images cannot be read so far, on other processes a.png", "2 training images cannot")
    assert [caplog.text.count(count) for count in counts] == [1, 1]
    assert run.state.iteration == 4
    assert epoch_records(run.folder)[0]["unreadable"] == 1


def test_an_unreadable_image_of_this_process_is_told_of_once(build, tmp_path, caplog):
    root = write_class_folders(tmp_path / "broken")
    (root / "train" / "red" / "1.png").write_bytes(b"")
    run = build(f"data.root={root}")
    assert train(run) == 0
    assert caplog.text.count("red/1.png") == 1
    assert epoch_records(run.folder)[1]["unreadable"] == 1


def test_the_first_signal_decides(build):
    run = build()
    handlers = [signal.getsignal(number) for number in WATCHED]
    with run.watch as watch:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert watch.agreed(watch.flags()) == signal.SIGUSR1
    assert [signal.getsignal(number) for number in WATCHED] == handlers


def test_a_closed_terminal_stops_the_run_unless_it_was_told_to_go_on(build):
    watch = build().watch
    previous = signal.getsignal(signal.SIGHUP)
    try:
        for handler, expected in ((signal.SIG_IGN, None), (signal.SIG_DFL, signal.SIGHUP)):  # the first as nohup does
            signal.signal(signal.SIGHUP, handler)
            with watch:
                signal.raise_signal(signal.SIGHUP)
            assert watch.received == expected
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, previous)
