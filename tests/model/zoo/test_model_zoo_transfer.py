"""Downloads of checkpoints: from a server on this machine, and from Google Drive through a stand-in."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from zoo_cases import NAME, REMOTE, leftovers, released_weights, unfinished

from model.zoo import DownloadError, fetch, find, local_path
from model.zoo.verification import record_path


def test_a_complete_download_is_verified_recorded_and_moved_into_place(server, file, contents):
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


def test_an_interrupted_connection_resumes(server, file, contents):
    server.cuts = [1_000_000, 2_000_000]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=3000000-"]


def test_a_killed_download_resumes(server, file, contents):
    unfinished(file, f"{server.url}{REMOTE}", contents[:5_000_000])
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert server.requests == [(REMOTE, "bytes=5000000-")]
    assert leftovers(file) == []


def test_a_download_killed_after_its_last_byte_is_not_repeated(server, file, contents):
    unfinished(file, f"{server.url}{REMOTE}", contents)
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_server_without_ranges_starts_over(server, file, contents):
    server.has_ranges = False
    server.cuts = [1_000_000]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


@pytest.mark.parametrize("length", [3_000_000, 40_000_000])
def test_the_start_of_another_file_is_discarded(server, file, contents, length):
    unfinished(file, f"{server.url}{REMOTE}", b"\1" * length)
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_servers_temporary_faults_are_retried(server, file, contents, caplog):
    server.statuses = [503, 429]
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents
    assert "HTTP 503" in caplog.text


def test_a_server_that_keeps_failing_is_an_error_with_the_way_out(server, file):
    server.cuts = [1_000_000] + [0] * 9
    with pytest.raises(DownloadError, match=r"after 5 attempts .* resumes after 1,000,000 bytes"):
        fetch(NAME, source=server.url)
    assert not file.exists()
    assert len(leftovers(file)) == 1


def test_a_redirection_to_a_local_file_is_not_followed(server, file, contents, tmp_path):
    (tmp_path / "secret.pth").write_bytes(contents)
    server.location = (tmp_path / "secret.pth").as_uri()
    with pytest.raises(DownloadError, match=r"was refused \(HTTP 302"):
        fetch(NAME, source=server.url)
    assert not file.exists()
    assert leftovers(file) == []


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, DownloadError)])
def test_a_refusal_is_not_retried(server, file, status, kind):
    server.statuses = [status] * 2
    with pytest.raises(kind, match=f"{server.url}.*HTTP {status}"):
        fetch(NAME, source=server.url)
    assert len(server.requests) == (2 if status == 404 else 1)  # 404: the flat layout is tried, too
    assert not file.exists()


def test_a_file_cut_short_by_a_server_that_gives_no_length(server, file, contents):
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


def test_a_web_page_is_named_and_does_not_spoil_a_started_download(server, file, contents):
    aside = unfinished(file, f"{server.url}{REMOTE}", contents[:1_000_000])
    server.page = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>"
    with pytest.raises(DownloadError, match=r"gives a web page \('Quota exceeded'\) .* quota"):
        fetch(NAME, source=server.url)
    assert aside.read_bytes() == contents[:1_000_000]
    server.page = b""
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


def test_a_web_page_without_its_content_type(server, file):
    server.files[REMOTE] = b"<html><title>Virus scan warning</title></html>"
    with pytest.raises(ValueError, match=r"is a web page \('Virus scan warning'\)"):
        fetch(NAME, source=server.url)
    assert not file.exists()


def test_a_file_with_another_checksum_than_recorded_is_refused(server, file, contents):
    fetch(NAME, source=server.url)
    recorded = hashlib.sha256(contents).hexdigest()
    file.unlink()
    other = io.BytesIO()
    weights = {name: torch.ones_like(value) for name, value in released_weights(find(NAME)).items()}
    torch.save({"net": weights}, other)
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


def test_lack_of_room_is_found_before_the_download(server, file, monkeypatch):
    usage = shutil.disk_usage(file.parents[2])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1_000))
    with pytest.raises(DownloadError, match=r"no room for .*bytes are needed, 1,000 are free"):
        fetch(NAME, source=server.url)
    assert leftovers(file) == []


def test_a_full_disk_keeps_what_was_downloaded(server, file, contents, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
        with pytest.raises(DownloadError, match=r"no room for .*free some space and try again; the download resumes"):
            fetch(NAME, source=server.url)
    assert not file.exists()
    assert len(leftovers(file)) == 1
    fetch(NAME, source=server.url)
    assert file.read_bytes() == contents


@pytest.fixture
def drive(monkeypatch):
    """A stand-in for gdown: gives `answer`, or raises it, and records what it was `asked`."""
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


def test_an_exceeded_quota_names_the_file_the_browser_and_other_sources(drive, file):
    quota = "Too many users have viewed or downloaded this file recently."
    drive.answer = sys.modules["gdown.exceptions"].DownloadError(quota)
    with pytest.raises(DownloadError, match=f"Google Drive does not give mobilemamba_t2 .{quota}.") as caught:
        fetch(NAME)
    assert str(file) in str(caught.value)
    assert "https://drive.google.com/file/d/1LXh5wjVEUu5Kj1foclC9zmlKsy7JpMQ-/view in a browser" in str(caught.value)
    assert "mirror or a folder" in str(caught.value)


def test_a_web_page_of_the_drive_instead_of_the_file(drive, file):
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
