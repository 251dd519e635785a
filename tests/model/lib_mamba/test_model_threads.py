"""The threads of the compiled kernels: how many, in which processes, what else they wait for."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import create_model
from model.lib_mamba import backends
from model.mobilemamba.blocks import Block, PatchMerging

pytestmark = pytest.mark.usefixtures("restored_threads")

# What PyTorch may do in a forward: make tensors and views of them.
WITHOUT_THREADS = {
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::empty",
    "aten::fill_",
    "aten::flatten",
    "aten::permute",
    "aten::narrow",
    "aten::reshape",
    "aten::select",
    "aten::slice",
    "aten::split",
    "aten::to",
    "aten::unflatten",
    "aten::unsqueeze",
    "aten::view",
    "aten::zero_",
    "aten::zeros",
}
# Elements from which on PyTorch shares most operations among its threads.
SHARED = 32768
# What a training step may do with more of them: views, new memory, and the sums that autograd makes between the steps.
WITH_MANY = WITHOUT_THREADS | {"aten::add", "aten::add_", "aten::alias", "aten::chunk", "aten::detach", "aten::view_as"}
TRAIN = """
import os, sys, time, torch
from model.mobilemamba.blocks import PatchMerging
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
before = len(os.listdir("/proc/self/task"))
images = torch.rand(4, 8, 8, 8)
PatchMerging(8, 16).train()(images)
deadline = 100
while deadline and len(os.listdir("/proc/self/task")) - before < int(sys.argv[1]):
    deadline -= 1
    time.sleep(0.1)
print(len(os.listdir("/proc/self/task")) - before)
"""
COUNT_THREADS = """
import os, sys, torch
from model import create_model
torch.set_num_threads(1)
network = create_model("MobileMamba_T2", num_classes=10).eval().fuse()
images = torch.rand(2, 3, 64, 64)
before = len(os.listdir("/proc/self/task"))
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    before_forward = len(os.listdir("/proc/self/task"))
    with torch.inference_mode():
        network(images)
    print(len(os.listdir("/proc/self/task")) - before_forward)
"""


@pytest.fixture
def network():
    if backends.choose("cpu").name != "cpu":
        pytest.skip("needs the compiled kernels")
    torch.manual_seed(0)
    return create_model("MobileMamba_T2", num_classes=10).eval().fuse()


@torch.inference_mode()
def test_a_forward_asks_nothing_of_the_threads_of_pytorch(network):
    torch.set_num_threads(2)
    images = torch.rand(16, 3, 64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        network(images)
    names = {event.key for event in profiler.key_averages()}
    assert names
    assert {name for name in names if not name.startswith("mobilemamba_kernels::")} <= WITHOUT_THREADS


@pytest.mark.parametrize("layers", [Block(64, global_ratio=0.5, local_ratio=0.25, kernel_size=5), PatchMerging(64, 96)])
def test_a_training_step_leaves_no_large_work_to_the_threads_of_pytorch(network, layers):
    torch.set_num_threads(2)
    x = torch.rand(16, 64, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    layers.train()(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        y = layers(x)
        y.backward(torch.ones_like(y))
    large = {
        event.name
        for event in profiler.events()
        if any(math.prod(shape) > SHARED for shape in event.input_shapes if isinstance(shape, list))
    }
    assert any(name.endswith("_step_backward") for name in large)
    assert {name for name in large if name.startswith("aten::")} <= WITH_MANY | {"aten::ones_like", "aten::empty_like"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize(("policy", "expected"), [(None, 3), ("passive", 1)])
def test_training_gives_openmp_a_second_team_unless_the_user_has_chosen_how_threads_wait(network, policy, expected):
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", TRAIN, f"{expected}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [f"{expected}"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_there_are_as_many_threads_as_pytorch_is_to_use(network):
    command = [sys.executable, "-c", COUNT_THREADS, "1", "3", "2", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["0", "2", "0", "1"]


@torch.inference_mode()
def test_several_threads_of_a_program_may_run_networks_at_once(network):
    torch.set_num_threads(3)
    images = torch.rand(4, 2, 3, 64, 64)
    expected = [network(part) for part in images]
    wrong: list[int] = []

    @torch.inference_mode()
    def serve(index):
        for _ in range(20):
            if not torch.equal(network(images[index]), expected[index]):
                wrong.append(index)

    servers = [threading.Thread(target=serve, args=(index,), daemon=True) for index in range(len(images))]
    for server in servers:
        server.start()
    for server in servers:
        server.join(timeout=120)
    assert not any(server.is_alive() for server in servers)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@torch.inference_mode()
def test_a_forked_process_has_threads_of_its_own(network):
    torch.set_num_threads(2)
    images = torch.rand(2, 3, 64, 64)
    expected = network(images)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(network(images), expected) else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
