"""What the launchers' variables mean."""

from __future__ import annotations

import pytest

from util.launch import Launch, as_environment, find_launch, first_host

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[03-04,9]",
    "SLURM_JOB_ID": "77",
}


def test_a_plain_process():
    assert find_launch({}) == Launch(rank=0, local_rank=0, world_size=1)


def test_torchrun():
    found = find_launch({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **SLURM}, logging_rank=3)
    assert found == Launch(rank=3, local_rank=1, world_size=4, dist_url="env://", logging_rank=3)
    assert found.is_logging


def test_slurm():
    found = find_launch(SLURM)
    assert (found.rank, found.local_rank, found.world_size) == (5, 1, 8)
    assert found.dist_url == "tcp://gpu03:12077"
    assert not found.is_logging


@pytest.mark.parametrize(
    ("more", "url"),
    [
        ({"SLURM_JOB_NODELIST": "a1,b2"}, "tcp://a1:12077"),
        ({"MASTER_ADDR": "host"}, "tcp://host:12077"),
        ({"MASTER_ADDR": "host", "MASTER_PORT": "1234"}, "tcp://host:1234"),
        ({"SLURM_STEP_ID": "2"}, "tcp://gpu03:12079"),
    ],
)
def test_where_slurm_processes_meet(more, url):
    assert find_launch(SLURM | more).dist_url == url


def test_slurm_ranks_agree_where_to_meet():
    urls = {find_launch(SLURM | {"SLURM_PROCID": str(rank)}).dist_url for rank in range(8)}
    assert len(urls) == 1


def test_a_slurm_step_has_its_own_count():
    assert find_launch(SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}).world_size == 2


def test_other_libraries_read_torchruns_variables():
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03", "MASTER_PORT": "12077"}
    assert as_environment(find_launch(SLURM)) == expected
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert as_environment(find_launch(given)) == given


def test_a_given_url_is_kept():
    assert find_launch(SLURM, dist_url="tcp://elsewhere:1").dist_url == "tcp://elsewhere:1"


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("gpu[03-05,07],cpu1", "gpu03"),
        ("gpu[12,14]", "gpu12"),
        ("rack1-n[001-128]-ib,other", "rack1-n001-ib"),
        ("a-b-c.domain.org", "a-b-c.domain.org"),
    ],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


def test_an_empty_node_list():
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 is not one of 2 processes"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": ""}, "SLURM_NTASKS is ''"),
    ],
)
def test_bad_variables(variables, message):
    with pytest.raises(ValueError, match=message):
        find_launch(variables)


def test_a_logging_rank_that_is_not():
    with pytest.raises(ValueError, match=r"--logger_rank 2 .* 0\.\.1"):
        find_launch({"RANK": "0", "WORLD_SIZE": "2"}, logging_rank=2)
