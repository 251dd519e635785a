"""Checkpoint files and a run's folder: kills, full disks, resumes that do not fit, two processes in one folder."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainer import run_folder
from trainer.checkpoint import (
    TRAINING_ENTRIES,
    CheckpointStore,
    check_resumable,
    load_training_checkpoint,
    save_atomically,
)
from trainer.run_folder import RunLock, check_free_space, make_run_folder
from util.seed import get_rng_state

ROOT = Path(__file__).resolve().parents[2]
META = {
    "world_size": 2,
    "batch_size": 64,
    "batch_size_per_gpu": 32,
    "accumulation_steps": 1,
    "model": "MobileMamba_T2",
    "fingerprint": "abc",
}


def state(**changed: object) -> dict[str, object]:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    complete = {
        "net": network.state_dict(),
        "net_E": None,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3},
        "scaler": torch.amp.GradScaler("cpu", enabled=True).state_dict(),
        "iter": 12,
        "epoch": 3,
        "scores": {"net": [np.float64(71.5), np.float32(0.25)], "net_E": []},
        "time_spent": 1.5,
        "rng": [get_rng_state()],
        "meta": META,
    }
    return {**complete, **changed}


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


KILLED_WHILE_SAVING = """
import os, sys, time
import torch
from trainer import checkpoint

checkpoint.save_atomically({"epoch": 1}, sys.argv[1])

def wait(*args, **kwargs):
    print("saving", flush=True)
    time.sleep(60)

if sys.argv[2] == "written":  # all is written aside, and not yet renamed
    os.fsync = wait
else:  # half is written
    save = torch.save
    def save_half(obj, file):
        save(obj, file)
        file.truncate(file.tell() // 2)
        file.flush()
        wait()
    torch.save = save_half
checkpoint.save_atomically({"epoch": 2}, sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["half", "written"])
def test_killed_while_saving(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "latest_ckpt.pth"
    process = run_script(KILLED_WHILE_SAVING, path, moment)
    assert process.stdout.readline() == "saving\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    leftovers = [file for file in tmp_path.iterdir() if file != path]
    assert [file.suffix for file in leftovers] == [".part"]
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    store = CheckpointStore(tmp_path)
    assert store.latest() == path
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", ["1.part", "1-00.tmp"], ids=["today's", "of an older run"])
def test_a_leftover_is_never_resumed_from(tmp_path: Path, ending: str) -> None:
    leftover = tmp_path / f".latest_ckpt.pth.{ending}"
    torch.save(state(), leftover)
    torch.save(state(), tmp_path / "ckpt_15.pth")
    with pytest.raises(FileNotFoundError, match=r"holds no latest_ckpt\.pth .*copy one of ckpt_15\.pth to that name"):
        CheckpointStore(tmp_path).latest()
    assert not leftover.exists()


@pytest.mark.parametrize("ending", ["1.part", "1-00.tmp"], ids=["today's", "of an older run"])
def test_next_save_removes_only_its_own_leftovers(tmp_path: Path, ending: str) -> None:
    own, other = tmp_path / f".net.pth.{ending}", tmp_path / f".net_E.pth.{ending}"
    own.touch()
    other.touch()
    save_atomically({"epoch": 1}, tmp_path / "net.pth")
    assert not own.exists()
    assert other.exists()


FILE_LIMITS = """
import resource, sys
import torch
from trainer.checkpoint import save_atomically

save_atomically({"epoch": 1}, sys.argv[1])
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_atomically({"weights": torch.zeros(300, 1000), "more": torch.zeros(1000)}, sys.argv[1])
    except OSError as error:
        print(error.errno, error.filename, error.strerror, sep="|")
"""


def test_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    limits = (0, 2_000, 700_000, 1_203_000)  # bytes: fails at once, in the header, in the weights, at the very end
    output, _ = run_script(FILE_LIMITS, path, *limits).communicate(timeout=60)
    for _, line in zip(limits, output.splitlines(), strict=True):
        code, name, text = line.split("|")
        assert (int(code), name) == (errno.EFBIG, str(path))
        assert "cannot be saved (File too large); the one saved before is intact" in text
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True) == {"epoch": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("saved_before", "told"),
    [(False, "nothing was saved there before"), (True, "the one saved before is intact")],
)
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_before: bool, told: str) -> None:
    path = tmp_path / "net.pth"
    if saved_before:
        save_atomically({"epoch": 1}, path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    opened = Path.open

    def open_full(self: Path, mode: str):
        opened(self, mode).close()
        return opened(Path("/dev/full"), "wb")

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match=rf"No space left on device.*{told}") as caught:
        save_atomically({"weights": torch.zeros(9)}, path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be saved"):
        save_atomically({}, tmp_path / "gone" / "net.pth")


def test_interrupt_removes_the_file_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"epoch": 1}, tmp_path / "net.pth")
    assert list(tmp_path.iterdir()) == []


def test_written_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append(("folder" if is_folder else os.fstat(descriptor).st_size, (tmp_path / "net.pth").exists()))

    monkeypatch.setattr(os, "fsync", note)
    save_atomically({"epoch": 1}, tmp_path / "net.pth")
    assert seen == [((tmp_path / "net.pth").stat().st_size, False), ("folder", True)]


def test_file_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_atomically({}, tmp_path / "net.pth")
    assert (tmp_path / "net.pth").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_contents_become_plain(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(4.0))
    contents = {
        "weights": OrderedDict(a=weight, tied=weight.detach().view(2, 2)),
        "numbers": (np.float64(0.5), np.int32(3), np.bool_(False), None, 1 + 2j, "text", b"bytes"),
        "array": np.arange(3),
        3: [True],
    }
    save_atomically(contents, tmp_path / "file.pth")
    read = torch.load(tmp_path / "file.pth", weights_only=True)
    assert read["numbers"] == (0.5, 3, False, None, 1 + 2j, "text", b"bytes")
    assert [type(number) for number in read["numbers"][:3]] == [float, int, bool]
    assert type(read["weights"]) is dict
    assert type(read["weights"]["a"]) is torch.Tensor
    assert read["weights"]["a"].data_ptr() == read["weights"]["tied"].data_ptr()
    assert torch.equal(read["array"], torch.arange(3))
    assert read[3] == [True]


@pytest.mark.parametrize("value", [Path("x"), nn.Linear(1, 1), {1, 2}], ids=["path", "module", "set"])
def test_object_that_would_not_load_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=re.escape("checkpoint['scheduler'][1] is a ")):
        save_atomically({"scheduler": [1, value]}, tmp_path / "file.pth")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_store(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    weights = nn.BatchNorm1d(2).state_dict()
    assert store.save_latest(state()) == store.latest() == tmp_path / "latest_ckpt.pth"
    assert store.save_periodic(state(), 15) == tmp_path / "ckpt_15.pth"
    assert store.save_best_net(weights, epoch=2, scores={"top1": np.float64(70)}) == tmp_path / "net.pth"
    assert store.save_best_ema(weights, epoch=3, scores={"top1": 71.0}) == tmp_path / "net_E.pth"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ckpt_15.pth",
        "latest_ckpt.pth",
        "net.pth",
        "net_E.pth",
    ]
    best = torch.load(tmp_path / "net_E.pth", weights_only=True)
    assert (list(best), best["epoch"], best["scores"]) == (["net_E", "epoch", "scores"], 3, {"top1": 71.0})
    assert list(best["net_E"]) == list(weights)
    assert list(torch.load(tmp_path / "net.pth", weights_only=True)) == ["net", "epoch", "scores"]


def test_training_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    saved = state(net_E=nn.Linear(3, 2).state_dict())
    read = load_training_checkpoint(CheckpointStore(tmp_path).save_latest(saved))
    assert tuple(read) == tuple(saved) == TRAINING_ENTRIES
    assert read["scores"] == saved["scores"]
    assert read["meta"] == META
    for name in ("net", "net_E"):
        assert all(torch.equal(read[name][entry], value) for entry, value in saved[name].items())
    optimizer = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    optimizer.load_state_dict(read["optimizer"])
    expected = saved["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], expected)
    assert read["rng"][0]["python"] == saved["rng"][0]["python"]


def test_latest_replaces_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for epoch in (1, 2):
        store.save_latest(state(epoch=epoch))
    assert load_training_checkpoint(store.latest())["epoch"] == 2


def test_incomplete_state_is_not_saved(tmp_path: Path) -> None:
    incomplete = state()
    del incomplete["optimizer"], incomplete["iter"]
    with pytest.raises(ValueError, match=r"saved as latest_ckpt\.pth lacks optimizer, iter"):
        CheckpointStore(tmp_path).save_latest(incomplete)


def test_resume_from_only_weights(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save_best_net(nn.Linear(1, 1).state_dict(), epoch=1, scores={})
    with pytest.raises(
        ValueError, match=r"net\.pth cannot be resumed from, it lacks net_E, optimizer, .*checkpoint_path="
    ):
        load_training_checkpoint(path)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no latest_ckpt\.pth to resume from: start a new run"):
        CheckpointStore(tmp_path).latest()
    weights = CheckpointStore(tmp_path).save_best_net({}, epoch=1)
    with pytest.raises(FileNotFoundError, match=rf": start a new run, from its weights with .*path={weights}$"):
        CheckpointStore(tmp_path).latest()


def test_same_run_resumes() -> None:
    assert check_resumable(META, META, rescale=False, path="x.pth") == ()


def test_another_total_batch_is_refused_or_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    then, now = META["batch_size"], 2 * META["batch_size"]
    current = {**META, "batch_size": now}
    with pytest.raises(
        ValueError, match=rf"x\.pth was saved with batch_size={then}, this run has batch_size={now}.*"
    ) as e:
        check_resumable(META, current, rescale=False, path="x.pth")
    assert "trainer.resume_rescale=True" in str(e.value)
    assert check_resumable(META, current, rescale=True, path="x.pth") == ("batch_size",)
    assert f"batch_size={then}; the run resumes with batch_size={now}" in caplog.text


@pytest.mark.parametrize(("name", "now"), [("world_size", 4), ("batch_size_per_gpu", 16), ("accumulation_steps", 2)])
def test_the_same_batch_may_be_shared_otherwise(name: str, now: int, caplog: pytest.LogCaptureFixture) -> None:
    assert check_resumable(META, {**META, name: now}, rescale=False, path="x.pth") == (name,)
    assert f"{name}={META[name]}; the run resumes with {name}={now}" in caplog.text


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"fingerprint": "xyz"}, r"x\.pth was trained on another dataset \(fingerprint abc, this one has xyz\)"),
        ({"model": "MobileMamba_T4"}, r"x\.pth is of MobileMamba_T2, not of MobileMamba_T4: set model\.name="),
    ],
)
def test_other_data_or_network_is_refused(change: dict[str, str], cause: str, rescale: bool) -> None:
    with pytest.raises(ValueError, match=cause):
        check_resumable(META, {**META, **change}, rescale=rescale, path="x.pth")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("test_fingerprint", "another validation set (24 training and 15 validation images, this run has 24 .* 15 .*)"),
        ("contents", "images with other contents under the same names (24 .* 15 .*)"),
    ],
)
def test_other_validation_set_or_contents_are_refused_or_accepted(
    name: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    current = {**META, "num_train": 24, "num_test": 15, "test_fingerprint": "t", "contents": "c"}
    saved = {**current, name: "other"}
    told = "x.pth was trained (on|with) " + cause.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"{told}: .*trainer.resume_data=True"):
        check_resumable(saved, current, rescale=False, path="x.pth")
    assert check_resumable(saved, current, rescale=False, path="x.pth", other_data=True) == ()
    assert re.search(told, caplog.text)
    caplog.clear()
    assert check_resumable(META, current, rescale=False, path="x.pth") == ()  # checkpoints of before lack these facts
    assert not caplog.text


def test_checkpoint_without_the_facts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.pth cannot be resumed from: its meta lacks fingerprint, world_size"):
        check_resumable({name: META[name] for name in list(META)[1:-1]}, META, rescale=True, path="x.pth")


def test_new_folder_is_named_after_the_run_and_the_time(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "deep" / "runs", "mobilemamba_t2")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    assert re.fullmatch(r"mobilemamba_t2_\d{8}-\d{6}", folder.name)


def _make_in_process(parent: Path, folders: multiprocessing.Queue) -> None:
    folders.put(str(make_run_folder(parent, "run")))


def test_runs_that_start_at_once_get_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20250101-000000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make_run_folder(tmp_path, "run"), range(12)))
    context = multiprocessing.get_context("fork")
    folders = context.Queue()
    processes = [context.Process(target=_make_in_process, args=(tmp_path, folders)) for _ in range(2)]
    for process in processes:
        process.start()
    made += [Path(folders.get(timeout=30)) for _ in processes]
    for process in processes:
        process.join()
    expected = ["run_20250101-000000", *(f"run_20250101-000000-{number}" for number in range(1, 14))]
    assert sorted(folder.name for folder in made) == sorted(expected)


def test_folder_to_resume_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run_folder(tmp_path / "runs", "t2")
    monkeypatch.chdir(tmp_path)
    for given in (run, str(run), run.name, Path("runs") / run.name):
        assert make_run_folder(tmp_path / "runs", "other", resume_dir=given).resolve() == run
    assert list((tmp_path / "runs").iterdir()) == [run]


def test_missing_folder_to_resume_names_the_nearest(tmp_path: Path) -> None:
    for name in ("t2_20250101-000000", "t2_20250102-000000", "b1_20250101-000000", "t4_x"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"resume_dir=t2_20250102; the nearest in .*: t2_20250102-000000, ") as caught:
        make_run_folder(tmp_path, "t2", resume_dir="t2_20250102")
    assert "t4_x" not in str(caught.value)
    with pytest.raises(ValueError, match=r"there is no run in .*nowhere either"):
        make_run_folder(tmp_path / "nowhere", "t2", resume_dir="t2_20250102")


def test_file_to_resume_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "latest_ckpt.pth").touch()
    with pytest.raises(ValueError, match=rf"is a file: name the run's folder, {re.escape(str(tmp_path))}$"):
        make_run_folder(tmp_path, "t2", resume_dir=tmp_path / "latest_ckpt.pth")


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(OSError, match=r"cannot be written to .*trainer\.checkpoint=PATH") as caught:
        make_run_folder(tmp_path / "runs", "t2")
    assert caught.value.filename == str(tmp_path / "runs")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, resume: bool
) -> None:
    # A mode without write permission does not stop root, so the refusal is simulated.
    def refuse(**kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=rf"cannot be written to \({os.strerror(code)}\)") as caught:
        make_run_folder(tmp_path, "t2", resume_dir=tmp_path if resume else "")
    assert caught.value.errno == code


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"MiB are free and the checkpoints of this run need 1,099,511,627,776 MiB"):
        check_free_space(tmp_path, 2**60)


def _hold_with_a_worker(folder: Path, pids: multiprocessing.connection.Connection) -> None:
    lock = RunLock(folder)
    worker = os.fork()  # as a data worker is, which outlives by a moment a parent that is killed
    if worker:
        pids.send((os.getpid(), worker))
    time.sleep(60)
    lock.release()


@pytest.mark.parametrize("kind", ["record", "claim"])
def test_lock_is_held_until_its_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "claim":
        monkeypatch.setattr(run_folder, "fcntl", None)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold_with_a_worker, args=(tmp_path, there))
    process.start()
    holder, worker = here.recv()
    try:
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is in use by process {holder} on \S+: wait"):
            RunLock(tmp_path)
        process.kill()
        process.join()
        RunLock(tmp_path).release()
        os.kill(worker, 0)  # the worker still runs
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["record", "claim", "unsupported"])
def test_released_lock_can_be_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "claim":
        monkeypatch.setattr(run_folder, "fcntl", None)
    if kind == "unsupported":

        def refuse(*args: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    for _ in range(2):
        lock = RunLock(tmp_path)
        assert f"process {os.getpid()} on " in (tmp_path / "run.lock").read_text() or kind == "record"
        lock.release()
        lock.release()


def test_claim_of_another_machine_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "fcntl", None)
    (tmp_path / "run.claim").write_text("process 99999999 on elsewhere\n")
    with pytest.raises(
        ValueError, match=r"in use by process 99999999 on elsewhere.*if it is gone, delete .*run\.claim"
    ):
        RunLock(tmp_path)
    (tmp_path / "run.claim").write_text(f"process 99999999 on {run_folder.socket.gethostname()}\n")
    RunLock(tmp_path).release()


def test_lock_of_one_run_leaves_others_alone(tmp_path: Path) -> None:
    first = RunLock(make_run_folder(tmp_path, "t2"))
    second = RunLock(make_run_folder(tmp_path, "t2"))
    first.release()
    second.release()


def test_lock_that_fails_otherwise_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_folder.fcntl, "lockf", fail)
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path)
