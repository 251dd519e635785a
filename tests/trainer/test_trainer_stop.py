"""Signals: which one counts, when a second one ends the run at once, and that all processes hear of it."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from trainer.stop import WATCHED, SignalError, SignalWatch, stop_on_signal

QUIET = [0.0] * len(WATCHED)


def flags_of(*numbers: int) -> list[float]:
    return [float(number in numbers) for number in WATCHED]


def test_only_a_second_interrupt_ends_at_once(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with SignalWatch() as watch:
        assert watch.flags() == QUIET
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert watch.received == signal.SIGTERM
        assert watch.flags() == flags_of(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="second Ctrl-C"):
            signal.raise_signal(signal.SIGINT)


def test_torchrun_repeats_the_terminals_interrupt(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with SignalWatch() as watch:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert watch.received == signal.SIGINT


@pytest.mark.parametrize("own", [QUIET, flags_of(signal.SIGUSR1)])
@pytest.mark.parametrize(
    ("others", "exit_code"), [((signal.SIGTERM,), 143), ((signal.SIGUSR1, signal.SIGINT), 130), ((), None)]
)
def test_every_process_stops_by_the_same_signal(own, others, exit_code):
    process = SimpleNamespace(sum=lambda flags: [sum(pair) for pair in zip(flags, flags_of(*others), strict=True)])
    watch = SignalWatch()
    watch.received = signal.SIGUSR1 if any(own) else None
    expected = exit_code or (138 if any(own) else None)
    if expected is None:
        stop_on_signal(process, watch)
        return
    with pytest.raises(SignalError, match=f"^stopped by {signal.Signals(expected - 128).name}$") as caught:
        stop_on_signal(process, watch)
    assert caught.value.exit_code == expected
