"""Batches reach the device unchanged; a GPU, which stand-ins play here, copies them on a stream of their own."""

from __future__ import annotations

import contextlib

import pytest
import torch

from data import Batch
from trainer.transfer import Transfer


def test_on_a_cpu_nothing_changes():
    batch = Batch(torch.randn(2, 3, 4, 4), torch.tensor([1, 0]), {})
    images, targets = Transfer(torch.device("cpu"), torch.channels_last)(batch)
    assert torch.equal(images, batch.images)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets is batch.targets


class Machine:
    """A GPU that notes which stream gets what to do."""

    def __init__(self, monkeypatch):
        self.notes: list[tuple] = []
        self.current = "compute"
        self.num_streams = 0
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "stream", self.switch)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.current))

    def new_stream(self, device):
        self.num_streams += 1
        return Stream(self, "copies")

    @contextlib.contextmanager
    def switch(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, machine, name):
        self.machine, self.name = machine, name

    def wait_stream(self, other):
        self.machine.notes.append((self.name, "waits for", other.name))


class Values:
    def __init__(self, machine, name):
        self.machine, self.name = machine, name

    def to(self, device, *, non_blocking, memory_format=torch.preserve_format):
        assert non_blocking
        self.machine.notes.append((self.machine.current, "copies", self.name, device.type, memory_format))
        return self

    def record_stream(self, stream):
        self.machine.notes.append((self.name, "is kept for", stream.name))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_on_a_gpu_a_step_waits_for_its_copy_alone(monkeypatch, num_batches):
    machine = Machine(monkeypatch)
    transfer = Transfer(torch.device("cuda", 0), torch.channels_last)
    for _ in range(num_batches):
        transfer(Batch(Values(machine, "images"), Values(machine, "targets"), {}))
    assert machine.notes == num_batches * [
        ("copies", "copies", "images", "cuda", torch.channels_last),
        ("copies", "copies", "targets", "cuda", torch.preserve_format),
        ("compute", "waits for", "copies"),
        ("images", "is kept for", "compute"),
        ("targets", "is kept for", "compute"),
    ]
    assert (machine.num_streams, machine.current) == (1, "compute")
