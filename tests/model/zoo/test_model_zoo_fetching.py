"""From a name to a verified file: two processes at once, folders of this machine, folders that cannot be written."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from zoo_cases import NAME, REMOTE, leftovers

from model.zoo import DownloadError, fetch, places


def _fetch_in_process(folder: str, url: str, queue) -> None:
    places.ROOT = Path(folder)
    queue.put(str(fetch(NAME, source=url)))


def test_of_two_processes_one_downloads(server, file, contents):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (str(file.parents[2]), server.url, queue)
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [str(file)] * 2
    for process in processes:
        process.join()
    assert len(server.requests) == 1
    assert file.read_bytes() == contents


def test_one_that_waits_says_so(server, file, contents, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("model.zoo.fetching.PATIENCE_SECONDS", 0.01)
    file.parent.mkdir(parents=True)
    with FileLock(f"{file}.lock", thread_local=False) as held:
        second = threading.Thread(target=fetch, args=(NAME,), kwargs={"source": server.url})
        second.start()
        while "waiting for it" not in caplog.text:
            second.join(0.01)
        file.write_bytes(contents)
        held.release()
        second.join()
    assert server.requests == []


def test_a_folder_that_cannot_be_written_is_named(server, file, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(DownloadError, match=r"mobilemamba_t2\.pth cannot be written .*make .*MobileMamba_T2 writable"):
        fetch(NAME, source=server.url)


@pytest.mark.parametrize("layout", [REMOTE, "mobilemamba_t2.pth"])
def test_a_local_folder_in_either_layout(file, contents, tmp_path, layout):
    (tmp_path / "shared" / layout).parent.mkdir(parents=True)
    (tmp_path / "shared" / layout).write_bytes(contents)
    fetch(NAME, source=tmp_path / "shared")
    assert file.read_bytes() == contents
    assert leftovers(file) == []


def test_a_local_folder_without_the_file(file, tmp_path):
    with pytest.raises(ValueError, match=r"has neither MobileMamba_T2/mobilemamba_t2\.pth nor mobilemamba_t2\.pth"):
        fetch(NAME, source=tmp_path)
    with pytest.raises(ValueError, match="no such folder or file to take mobilemamba_t2 from"):
        fetch(NAME, source=tmp_path / "nowhere")
