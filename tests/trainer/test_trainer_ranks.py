"""Two processes act as one."""

from __future__ import annotations

import os
import re
import time

import pytest
import torch
import two_ranks
from torch import multiprocessing
from trainer_cases import assert_same


@pytest.fixture(scope="module")
def played(class_folders, tmp_path_factory):
    """The results of every scenario, by scenario, of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(two_ranks.run_rank, (folder, class_folders), nprocs=2)
    left, right = (torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    return {name: (left[name], right[name]) for name in left}


def test_collectives(played):
    for result in played["collectives"]:
        assert result == {
            "sum": [2.0**54 - 2, 1.0],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "broadcast": "from 1",
            "first": 0,
            "caught": "invalid literal for int() with base 10: 'no number'",
        }


def test_no_thread_of_the_group_is_left_behind(played):
    assert played["threads"] == ([], [])


@pytest.mark.parametrize(("kind", "value"), [("reduce", 2.0), ("broadcast", 1.0), ("", 1.0)])
def test_statistics_are_made_equal(played, kind, value):
    for result in played["statistics"]:
        assert_same(result[kind], [torch.full((3,), value), torch.full((2,), value)])


def test_a_nan_on_one_rank_is_skipped_by_both(played):
    left, right = played["nan_on_one_rank"]
    for result in (left, right):
        assert (result["code"], result["skipped"], result["finite"], result["same"]) == (0, 1, True, True)
    assert_same(left["net"], right["net"])


def test_what_one_rank_finds_both_act_on_though_it_comes_later(played):
    left, right = played["deferred"]
    for result in (left, right):
        assert (result["code"], result["iter"], result["skipped"], result["same"]) == (143, 10, 1, True)
        assert result["slowest"] == 1
    assert_same(left["net"], right["net"])


def test_a_signal_to_one_rank_stops_both(played):
    assert played["signal_on_one_rank"] == ({"code": 143, "iter": 2}, {"code": 143, "iter": 2})


def test_two_ranks_resume_bit_for_bit(played):
    for result in played["resume"]:
        assert_same(result["resumed"], result["whole"])
    assert_same(*(result["whole"] for result in played["resume"]))  # the last test made the statistics equal


def test_a_smaller_world_continues_the_same_training(played):
    result = played["smaller_world"][0]
    assert result["position"] == (2, 2)
    for name, expected in result["whole"].items():
        torch.testing.assert_close(result["alone"][name], expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(result["alone"][name], result["stopped"][name])


def test_frozen_parts_stay_on_both(played):
    left, right = played["frozen"]
    assert left["changed"] == ["classifier", "conv_head"]
    assert left["classes"] == 3
    assert_same(left, right)


def test_both_list_an_unreadable_test_image(played):
    left, right = played["unreadable_test_image"]
    assert "green/1.png" in left
    assert left == right


def test_both_stop_when_one_cannot_save(played):
    left, right = played["disk_full"]
    assert len(left) == len(right) == 2
    for message in (*left, *right):
        assert "No space left on device" in message
        assert "there is no checkpoint yet" in message


def test_a_message_is_said_once_and_never_lost(played):
    left, right = played["messages"]
    assert left["both"] == (2, "error: no such thing\n")
    assert right["both"] == (2, "")
    assert left["one"] == (0, "")
    assert right["one"] == (2, "[rank 1] error: no such thing\n")


def start_ranks(target, *arguments):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=target, args=(rank, *arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    return ranks


def test_a_rank_that_hangs_takes_the_others_along(class_folders, tmp_path):
    left, right = start_ranks(two_ranks.run_rank_that_hangs, tmp_path, class_folders)
    try:
        left.join(timeout=120)
        assert left.exitcode == 1
        assert right.exitcode is None  # it is stopped
    finally:
        left.kill()
        right.kill()
    message = (tmp_path / "stderr0.txt").read_text()
    assert message.count("\n") == 1, message
    assert message.startswith("error: another process of the run was lost; the last good checkpoint is")


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_that_dies_on_one_rank_ends_both(class_folders, tmp_path):
    ranks = start_ranks(two_ranks.run_rank_whose_worker_dies, tmp_path, class_folders)
    for rank in ranks:
        rank.join(timeout=120)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    workers = [(tmp_path / f"workers{rank}.txt").read_text().split() for rank in (0, 1)]
    assert [len(numbers) for numbers in workers] == [1, 1]
    left, right = ((tmp_path / f"stderr{rank}.txt").read_text() for rank in (0, 1))
    assert "another process of the run was lost" in left
    assert re.match(r"\[rank 1\] error: a data worker died on rank 1 \(", right)
    assert "lower trainer.data.num_workers_per_gpu (now 1)" in right
    assert "the last good checkpoint is" in right
    assert [text.count("\n") for text in (left, right)] == [1, 1], left + right
    numbers = [int(number) for own in workers for number in own]
    deadline = time.monotonic() + 20
    while any(map(is_running, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, numbers))


def test_a_rank_that_dies_takes_the_others_along(class_folders, tmp_path):
    ranks = start_ranks(two_ranks.run_rank_that_dies, tmp_path, class_folders)
    for rank in ranks:
        rank.join(timeout=90)
    assert [rank.exitcode for rank in ranks] == [1, 9]
    message = (tmp_path / "message.txt").read_text()
    assert "another process of the run was lost" in message
    assert "the last good checkpoint is" in message
    assert message.split("checkpoint is ")[1].split("latest_ckpt.pth")[0].startswith(str(tmp_path / "runs"))
