"""Seeds and random states: repeatable, different on every rank, put back exactly."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from util.seed import get_rng_state, seed_everything, set_rng_state


@pytest.fixture(autouse=True)
def _put_back():
    state, flags = get_rng_state(), (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    set_rng_state(state)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
    torch.use_deterministic_algorithms(is_deterministic)


def draw() -> list[float]:
    """Draw from every generator; the odd number of normals leaves each with one cached."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def test_same_seed_same_numbers_and_other_ranks_others() -> None:
    drawn = []
    for seed, rank in ((42, 0), (42, 0), (42, 1), (43, 0)):
        assert seed_everything(seed, rank=rank) == seed + rank
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert all(first != other for first, other in zip(drawn[0], drawn[2], strict=True))


def test_seed_is_that_of_each_library() -> None:
    seed_everything(7)
    assert random.random() == random.Random(7).random()
    assert np.random.rand() == np.random.RandomState(7).rand()
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize(("seed", "rank"), [(-1, 0), (2**32 - 1, 1)])
def test_seed_out_of_range(seed: int, rank: int) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        seed_everything(seed, rank=rank)


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_everything(0, deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark != deterministic


def test_state_goes_through_a_file(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    torch.save(get_rng_state(), tmp_path / "state.pth")
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_taking_the_state_draws_nothing() -> None:
    seed_everything(5)
    expected = draw()
    seed_everything(5)
    get_rng_state()
    assert draw() == expected


def test_incomplete_state_changes_nothing() -> None:
    seed_everything(6)
    state = get_rng_state()
    expected = draw()
    set_rng_state(state)
    with pytest.raises(ValueError, match="lacks numpy, cuda; it holds python, torch"):
        set_rng_state({"python": random.Random(9).getstate(), "torch": state["torch"]})
    assert draw() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_state_on_a_machine_without(caplog: pytest.LogCaptureFixture) -> None:
    state = get_rng_state()
    assert state["cuda"] is None
    set_rng_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert "there is no CUDA device here" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_state_goes_through_a_file(tmp_path: Path) -> None:
    seed_everything(3)
    torch.randn(5, device="cuda")
    torch.save(get_rng_state(), tmp_path / "state.pth")
    expected = torch.randn(5, device="cuda")
    set_rng_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert torch.equal(torch.randn(5, device="cuda"), expected)
