"""What the fuzz tests share: the number of cases, damaged contents, a bound on the time of one case."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

T = TypeVar("T")

# 100 cases in the suite, always the same; 2,000 in ``make fuzz``, new ones each time.
COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("fuzz", max_examples=2000, **COMMON)

fuzzed = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@st.composite
def damaged(draw: st.DrawFn, contents: bytes, *, head: int = 3000) -> bytes:
    """Return contents with flipped bits, foreign bytes in place of some, a cut at either end, or all of these.

    Half of the places lie in the first ``head`` bytes, where what says how to read the rest stands.
    """
    spoiled = bytearray(contents)
    place = st.one_of(st.integers(0, min(head, len(contents)) - 1), st.integers(0, len(contents) - 1))
    for where in draw(st.lists(place, max_size=6)):
        spoiled[where] ^= 1 << draw(st.integers(0, 7))
    where, foreign = draw(place), draw(st.binary(max_size=12))
    spoiled[where : where + len(foreign)] = foreign
    start = draw(st.sampled_from((0, 0, 0, 1, 64)))
    return bytes(spoiled[start : draw(st.one_of(st.just(len(spoiled)), st.integers(0, len(spoiled))))])


@contextlib.contextmanager
def no_hang(seconds: int = 30) -> Iterator[None]:
    """Fail a case that takes longer; far more than any should need, so that a busy machine fails none."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no end after {seconds} seconds"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(function: Callable[[], T], refusal: type[Exception] = ValueError) -> tuple[T | None, Exception | None]:
    """Return what a function returns, or the refusal that it raises; any other exception, or no end, fails the case."""
    with no_hang():
        try:
            return function(), None
        except refusal as error:
            return None, error
