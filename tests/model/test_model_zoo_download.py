"""Downloads of checkpoints: from a server on this machine, from folders, and from Google Drive through a stand-in."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import logging
import multiprocessing
import shutil
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from file_server import serving

from model.mobilemamba import variant_shapes
from model.zoo import DownloadError, fetch, find, local_path
from model.zoo.verification import record_path

NAME = "mobilemamba_t2"
REMOTE = "MobileMamba_T2/mobilemamba_t2.pth"
shapes_of_variants = functools.cache(variant_shapes)


@pytest.fixture(scope="module")
def contents() -> bytes:
    """A whole checkpoint of T2."""
    shapes = shapes_of_variants()["MobileMamba_T2"]
    file = io.BytesIO()
    torch.save({"net": {name: torch.zeros(shape) for name, shape in shapes.items()}}, file)
    return file.getvalue()


@pytest.fixture
def server(contents, monkeypatch):
    monkeypatch.setattr("model.zoo.transfer.PAUSE_SECONDS", 0.001)
    with serving() as running:
        running.files[REMOTE] = contents
        yield running


@pytest.fixture
def file(weights_folder) -> Path:
    """Where the checkpoint belongs."""
    return weights_folder / REMOTE


def leftovers(file: Path) -> list[str]:
    return [path.name for path in file.parent.glob("*.part*")]


def begun(file: Path, url: str, contents: bytes) -> Path:
    """Leave what a download from a URL had got when it was killed."""
    file.parent.mkdir(parents=True)
    aside = file.with_name(f"{file.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
    aside.write_bytes(contents)
    return aside


# ---- a mirror


def test_a_whole_download_is_verified_recorded_and_put_in_its_place(server, file, contents):
    assert fetch(NAME, source=server.url) == file == local_path(find(NAME))
    assert file.read_bytes() == contents
    assert hashlib.sha256(contents).hexdigest() in record_path(file).read_text()
    assert leftovers(file) == []
    assert fetch(NAME, source=server.url) == file
    assert server.requests == [(REMOTE, None)]


def test_a_flat_mirror_and_the_address_of_the_file_itself(server, file, contents):
    server.files = {"mobilemamba_t2.pth": contents}
    fetch(NAME, source=server.url.rstrip("/"))
    assert [path for path, _ in server.requests] == [REMOTE, "mobilemamba_t2.pth"]
    shutil.rmtree(file.parent)
    fetch(NAME, source=f"{server.url}mobilemamba_t2.pth")
    assert file.read_bytes() == contents


def test_a_connection_that_is_cut_off_is_taken_up_where_it_ended(server, file, contents):
    server.cuts = [1_000_000, 2_000_000]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=3000000-"]


def test_a_download_that_was_killed_is_gone_on_with(server, file, contents):
    begun(file, f"{server.url}{REMOTE}", contents[:5_000_000])
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert server.requests == [(REMOTE, "bytes=5000000-")]
    assert leftovers(file) == []


def test_one_that_was_killed_when_all_was_there_asks_for_nothing_more(server, file, contents):
    begun(file, f"{server.url}{REMOTE}", contents)
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_server_without_ranges_starts_over(server, file, contents):
    server.has_ranges = False
    server.cuts = [1_000_000]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


@pytest.mark.parametrize("length", [3_000_000, 40_000_000])
def test_what_was_begun_of_another_file_is_thrown_away(server, file, contents, length):
    begun(file, f"{server.url}{REMOTE}", b"\1" * length)
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_passing_faults_of_a_server_are_waited_out(server, file, contents, caplog):
    server.statuses = [503, 429]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert "HTTP 503" in caplog.text


def test_a_server_that_stays_away_is_an_error_with_the_way_out(server, file):
    server.cuts = [1_000_000] + [0] * 9
    with pytest.raises(DownloadError, match=r"after 5 attempts .* resumes after 1,000,000 bytes"):
        fetch(NAME, source=server.url)
    assert not file.exists()
    assert len(leftovers(file)) == 1


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, DownloadError)])
def test_a_refusal_is_not_asked_again(server, file, status, kind):
    server.statuses = [status] * 2
    with pytest.raises(kind, match=f"{server.url}.*HTTP {status}"):
        fetch(NAME, source=server.url)
    assert len(server.requests) == (2 if status == 404 else 1)  # 404: the flat layout is tried, too
    assert not file.exists()


def test_a_file_that_the_server_ends_early_without_saying_its_length(server, file, contents):
    server.has_length = False
    server.files[REMOTE] = contents[:1_000_000]
    with pytest.raises(ValueError, match=r"does not give mobilemamba_t2: .* is truncated or damaged \(1,000,000 bytes"):
        fetch(NAME, source=server.url)
    assert not file.exists()
    assert leftovers(file) == []


def test_an_empty_file(server, file):
    server.files[REMOTE] = b""
    server.has_ranges = False
    with pytest.raises(ValueError, match="is empty"):
        fetch(NAME, source=server.url)
    assert not file.exists()


def test_a_web_page_is_named_and_spoils_nothing_that_was_begun(server, file, contents):
    aside = begun(file, f"{server.url}{REMOTE}", contents[:1_000_000])
    server.page = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>"
    with pytest.raises(DownloadError, match=r"gives a web page \('Quota exceeded'\) .* quota"):
        fetch(NAME, source=server.url)
    assert aside.read_bytes() == contents[:1_000_000]
    server.page = b""
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_web_page_that_does_not_say_so(server, file):
    server.files[REMOTE] = b"<html><title>Virus scan warning</title></html>"
    with pytest.raises(ValueError, match=r"is a web page \('Virus scan warning'\)"):
        fetch(NAME, source=server.url)
    assert not file.exists()


def test_a_file_with_another_checksum_than_recorded_is_refused(server, file, contents):
    fetch(NAME, source=server.url)
    recorded = hashlib.sha256(contents).hexdigest()
    file.unlink()
    other = io.BytesIO()
    shapes = shapes_of_variants()["MobileMamba_T2"]
    torch.save({"net": {name: torch.ones(shape) for name, shape in shapes.items()}}, other)
    server.files[REMOTE] = other.getvalue()
    with pytest.raises(ValueError, match="take it from another source") as caught:
        fetch(NAME, source=server.url)
    assert recorded in str(caught.value)
    assert hashlib.sha256(other.getvalue()).hexdigest() in str(caught.value)
    assert not file.exists()


def test_an_unknown_name_asks_no_server(server, file):
    with pytest.raises(ValueError, match="the nearest is 'mobilemamba_t2'"):
        fetch("mobilemambat2", source=server.url)
    assert server.requests == []


# ---- two at once


def _fetch_in_process(folder: str, url: str, queue) -> None:
    import model.zoo.places

    model.zoo.places.ROOT = Path(folder)
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
    from filelock import FileLock

    with FileLock(f"{file}.lock", thread_local=False) as held:
        second = threading.Thread(target=fetch, args=(NAME,), kwargs={"source": server.url})
        second.start()
        while "waiting for it" not in caplog.text:
            second.join(0.01)
        file.write_bytes(contents)
        held.release()
        second.join()
    assert server.requests == []


# ---- the disk


def test_no_room_is_found_before_the_download(server, file, monkeypatch):
    usage = shutil.disk_usage(file.parents[2])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1_000))
    with pytest.raises(DownloadError, match=r"no room for .*bytes are needed, 1,000 are free"):
        fetch(NAME, source=server.url)
    assert leftovers(file) == []


def test_a_disk_that_fills_up_keeps_what_was_got(server, file, contents, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(DownloadError, match=r"no room for .*free some space and try again; the download resumes"):
            fetch(NAME, source=server.url)
    assert not file.exists()
    assert len(leftovers(file)) == 1
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_folder_that_cannot_be_written_is_named(server, file, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(DownloadError, match=r"mobilemamba_t2\.pth cannot be written .*make .*MobileMamba_T2 writable"):
        fetch(NAME, source=server.url)


# ---- a folder of this machine


@pytest.mark.parametrize("layout", [REMOTE, "mobilemamba_t2.pth"])
def test_a_local_folder_in_either_layout(file, contents, tmp_path, layout):
    (tmp_path / "shared" / layout).parent.mkdir(parents=True)
    (tmp_path / "shared" / layout).write_bytes(contents)
    fetch(NAME, source=tmp_path / "shared")
    assert file.read_bytes() == contents
    assert leftovers(file) == []


def test_a_local_place_that_has_it_not(file, tmp_path):
    with pytest.raises(ValueError, match=r"has neither MobileMamba_T2/mobilemamba_t2\.pth nor mobilemamba_t2\.pth"):
        fetch(NAME, source=tmp_path)
    with pytest.raises(ValueError, match="no such folder or file to take mobilemamba_t2 from"):
        fetch(NAME, source=tmp_path / "nowhere")


# ---- Google Drive


@pytest.fixture
def drive(monkeypatch):
    """A stand-in for gdown: what it is to do, and what it was asked."""
    module, exceptions = types.ModuleType("gdown"), types.ModuleType("gdown.exceptions")
    exceptions.DownloadError = type("DownloadError", (Exception,), {})
    module.asked = []

    def download(*, output, progress, **asked):
        module.asked.append(asked)
        if isinstance(module.answer, Exception):
            raise module.answer
        progress(10, None)
        progress(len(module.answer), len(module.answer))
        Path(output).write_bytes(module.answer)

    module.download = download
    monkeypatch.setitem(sys.modules, "gdown", module)
    monkeypatch.setitem(sys.modules, "gdown.exceptions", exceptions)
    return module


def test_the_original_source_is_google_drive(drive, file, contents):
    drive.answer = contents
    fetch(NAME)
    assert file.read_bytes() == contents
    assert drive.asked[0]["id"] == "1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-"
    assert drive.asked[0]["resume"]
    assert leftovers(file) == []


def test_a_used_up_quota_names_the_file_the_browser_and_other_sources(drive, file):
    quota = "Too many users have viewed or downloaded this file recently."
    drive.answer = sys.modules["gdown.exceptions"].DownloadError(quota)
    with pytest.raises(DownloadError, match=f"Google Drive does not give mobilemamba_t2 .{quota}.") as caught:
        fetch(NAME)
    assert str(file) in str(caught.value)
    assert "https://drive.google.com/file/d/1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-/view in a browser" in str(caught.value)
    assert "mirror or a folder" in str(caught.value)


def test_the_drives_web_page_in_place_of_the_file(drive, file):
    drive.answer = b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
    with pytest.raises(ValueError, match=r"web page \('Google Drive - Quota exceeded'\).*quota"):
        fetch(NAME)
    assert not file.exists()
    assert leftovers(file) == []


def test_a_full_disk_under_the_drive(drive, file):
    drive.answer = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DownloadError, match="no room for"):
        fetch(NAME)


def test_without_gdown_the_way_out_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(DownloadError, match=r"pip install gdown`; or download https://drive\.google\.com"):
        fetch(NAME)
