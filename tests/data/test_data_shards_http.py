"""Shards behind an address: a server that fails at times, a cache with a limit, files that are gone or changed."""

import http.server
import socket
import threading
from functools import partial

import pytest
import torch

from data import build_loaders
from data.cache import Cache
from data.prepare import index_shards, to_shards
from data.shards import Shards
from model.zoo import transfer


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; where it fails at times, a file's first transfer breaks off, and its second is refused."""

    def __init__(self, folder, *, fails):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.fails = fails
        self.requests = []

    def handle_error(self, *_):
        pass  # a transfer that is broken off on purpose


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        number = self.server.requests.count(name)
        if self.server.fails and number == 2:
            self.send_error(503)
            return
        if self.server.fails and number == 1:
            self.wfile = Broken(self.wfile)
        super().do_GET()

    def log_message(self, *_):
        pass


class Broken:
    """Lets the headers and some bytes through."""

    def __init__(self, stream):
        self.stream = stream
        self.left = 2000

    def write(self, data):
        self.stream.write(data[: self.left])
        self.left -= len(data)
        if self.left <= 0:
            raise ConnectionResetError

    def flush(self):
        self.stream.flush()

    def close(self):
        self.stream.close()

    @property
    def closed(self):
        return self.stream.closed


@pytest.fixture
def packed(make_folders, tmp_path):
    folders = make_folders({"train": {"ant": 13, "bee": 11}, "val": {"ant": 2, "bee": 3}}, image_format="JPEG")
    to_shards(folders, tmp_path / "packed", images_per_shard=4)
    return tmp_path / "packed"


@pytest.fixture
def serve(packed, monkeypatch):
    """Return a function that serves the shards and returns the server and its address."""
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.001)
    servers = []

    def start(*, fails=False):
        server = Server(packed, fails=fails)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def batches(config):
    return [(batch.images, batch.targets) for batch in build_loaders(config, rank=0, world_size=1).train.iterate(1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_at_times_gives_the_same_batches(packed, serve, make_config, tmp_path, workers):
    server, address = serve(fails=True)
    local = batches(make_config(packed, type="Shards"))
    remote = make_config(address, type="Shards", workers=workers, cache=str(tmp_path / "cache"))
    for one, other in zip(batches(remote), local, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    shards = {name for name in server.requests if name.startswith("train") and name.endswith(".tar")}
    assert len(shards) == 6
    assert {server.requests.count(name) for name in shards} == {3}  # one process downloads for all
    server.requests.clear()
    batches(remote)
    assert not any(name.endswith(".tar") for name in server.requests)
    assert {path.name for path in (tmp_path / "cache").rglob("*.tar")} == shards


def test_the_cache_keeps_within_its_limit(packed, serve, tmp_path, caplog):
    _, address = serve()
    size = max(path.stat().st_size for path in packed.glob("train-*.tar"))
    cache = Cache(folder=tmp_path / "cache", max_bytes=3 * size)
    dataset = Shards(address, split="train", cache=cache)
    assert "they are downloaded repeatedly" in caplog.text
    local = Shards(packed, split="train")
    for index in [*range(len(dataset)), 0, 23]:
        assert dataset.read_bytes(index) == local.read_bytes(index)
        assert sum(path.stat().st_size for path in cache.folder.rglob("*.tar")) <= cache.max_bytes
    assert {path.name for path in cache.folder.rglob("*.tar")} == {f"train-{number:06d}.tar" for number in (3, 4, 5)}
    fresh = Shards(address, split="train", cache=cache)
    assert fresh.read_bytes(0) == local.read_bytes(0)  # one that was removed comes again
    with pytest.raises(ValueError, match=r"more than data\.cache_gb"):
        Shards(address, split="train", cache=Cache(folder=tmp_path / "cache", max_bytes=size - 1))


def test_a_shard_that_is_gone_or_changed_is_named_and_counted(packed, serve, make_config, tmp_path):
    server, address = serve()
    config = make_config(address, type="Shards", cache=str(tmp_path / "cache"))
    loaders = build_loaders(config, rank=0, world_size=1)
    (packed / "train-000001.tar").unlink()
    data = bytearray((packed / "train-000002.tar").read_bytes())
    data[-2000] ^= 1
    (packed / "train-000002.tar").write_bytes(data)
    unreadable = {}
    for batch in loaders.train.iterate(0):
        assert len(batch.targets) == 4
        unreadable |= batch.unreadable
    assert server.requests.count("train-000001.tar") == 1  # not again for every image
    assert server.requests.count("train-000002.tar") == 2
    causes = {name.partition(":byte")[0]: cause for name, cause in unreadable.items()}
    assert len(unreadable) == 8
    assert f"{address}/train-000001.tar does not exist" in causes[f"{address}/train-000001.tar"]
    assert "is not the file that the index describes" in causes[f"{address}/train-000002.tar"]


def test_an_address_without_an_index_or_a_server_is_refused(packed, serve, tmp_path):
    cache = Cache.create(str(tmp_path / "cache"))
    _, address = serve()
    Shards(address, split="val", cache=cache)
    for text in ("", "../../x  val-index.safetensors", "x" * 64):
        (packed / "val-index.safetensors.sha256").write_text(text)
        with pytest.raises(ValueError, match=r"val-index\.safetensors\.sha256 holds no SHA-256"):
            Shards(address, split="val", cache=cache)
    for path in packed.glob("val-index*"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"has no val-index\.safetensors\.sha256; where the shards lie, run `python -m"
    ):
        Shards(address, split="val", cache=cache)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(OSError, match="cannot be got after 5 attempts"):
            Shards(nobody, split="train", cache=cache)


def test_checkpoints_know_remote_shards_without_a_download(packed, serve, make_config, tmp_path):
    server, address = serve()
    config = make_config(address, type="Shards", cache=str(tmp_path / "cache"))
    first = build_loaders(config, rank=0, world_size=1).contents()
    assert not any(name.endswith(".tar") for name in server.requests)
    data = bytearray((packed / "train-000002.tar").read_bytes())
    data[-2000] ^= 1
    (packed / "train-000002.tar").write_bytes(data)
    index_shards(packed)
    assert build_loaders(config, rank=0, world_size=1).contents() != first
