"""What nvcc makes of the kernels for known widths: instructions of a warp, registers, spills. Needs no GPU.

`python tests/model/lib_mamba/test_model_cuda_counts.py` prints the tables of csrc/scan/README.md. nvdisasm comes with
the CUDA toolkit, or from PyPI as nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "model" / "lib_mamba" / "kernels" / "selective_scan" / "csrc"
FLAGS = ["-std=c++17", "-O3", "--use_fast_math", "-cubin", "-Xptxas", "-v"]
LANES = 32


class Case(NamedTuple):
    """A kernel of the forward pass: width, positions of a chunk, whether that is an image; blocks of its cluster."""

    channels: int
    chunk: int
    is_whole: bool
    blocks: int


CASES = [
    *(Case(224, 16, False, 5), Case(288, 16, False, 5), Case(320, 14, False, 7), Case(320, 16, False, 8)),
    *(Case(384, 12, False, 2), Case(448, 9, True, 1), Case(512, 12, False, 3), Case(512, 16, False, 4)),
    *(Case(544, 9, True, 1), Case(544, 12, False, 3), Case(544, 13, False, 4), Case(544, 16, False, 4)),
    Case(544, 16, True, 1),
]

# One chunk a slot, nothing to keep, and the sizes known: what remains is the loop over the images.
COUNTED = """
#include "scan/cuda/gated_scan_cluster.cuh"
namespace mobilemamba {{
template <typename T, int kD, int kC, bool kIsWhole, int kBlocks>
__global__ void __launch_bounds__(ClusterShape<kD>::kThreads, 1)
    counted(ScanInputs<T> p, NormInputs<T> norm, T* y) {{
  const ClusterPlan plan{{kBlocks, 1, 0}};
  const Kept kept{{}};
  ClusterWarp<T, kD, kC, kD, kIsWhole> warp{{p, norm, plan, y, kept}};
  warp.run();
}}
using T = c10::{type};
template __global__ void counted<T, {channels}, {chunk}, {is_whole}, {blocks}>(ScanInputs<T>, NormInputs<T>, T*);
}}  // namespace mobilemamba
"""

# Of the backward pass: width, positions of a chunk, the most bytes that a thread may store and reload, and instructions
# of a warp for 32 values of a channel and position in bfloat16.
BACKWARD = [
    *((224, 16, 0, 205), (288, 16, 32, 207), (320, 14, 16, 192), (320, 16, 16, 187)),
    *((384, 12, 0, 187), (448, 9, 0, 201), (512, 12, 0, 206), (512, 16, 0, 190)),
    *((544, 9, 0, 224), (544, 12, 0, 207), (544, 13, 0, 232), (544, 16, 32, 191)),
]

COMPLETE = """
#include "scan/cuda/gated_scan_cluster.cuh"
namespace mobilemamba {{
using T = c10::{type};
template __global__ void cluster_kernel<T, {channels}, {chunk}, 2 * {channels}, {is_whole}>(
    const ScanInputs<T>, const NormInputs<T>, const ClusterPlan, T*, const Kept);
}}  // namespace mobilemamba
"""
BACKWARD_COMPLETE = """
#include "scan/cuda/gated_scan_backward.cuh"
namespace mobilemamba {{
using T = c10::{type};
template __global__ void scan_backward_kernel<T, {rank_blocks}, {chunk}, {channels}>(const BackwardArguments<T>);
}}  // namespace mobilemamba
"""


@cache
def disassembler():
    """Return the path of nvdisasm, of the toolkit or of the PyPI package; None if there is neither."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    packaged = [str(path) for root in roots for path in Path(root).glob("*/bin/nvdisasm")]
    return shutil.which("nvdisasm") or next(iter(packaged), None)


def compile_source(text, folder, architecture):
    """Compile a kernel; return the file of its machine code, and what ptxas says."""
    source, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
    source.write_text(text)
    includes = [f"-I{path}" for path in (CSRC, *include_paths())]
    done = subprocess.run(
        ["nvcc", *FLAGS, f"-arch=sm_{architecture}", *includes, source, "-o", cubin],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def resources_in(report):
    """Return the most registers of a thread, and the bytes that it spills, by what ptxas says."""
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return max(map(int, re.findall(r"Used (\d+) registers", report))), spilled


def resources_of(text, architecture):
    """Return the same for the kernels of a source."""
    with tempfile.TemporaryDirectory() as folder:
        return resources_in(compile_source(text, folder, architecture)[1])


def resources(case, architecture, dtype="BFloat16"):
    """Return the same for a kernel of the forward pass as it is in the library."""
    text = COMPLETE.format(type=dtype, **{**case._asdict(), "is_whole": str(case.is_whole).lower()})
    return resources_of(text, architecture)


def longest_loop(cubin):
    """Return the mnemonics of a kernel's longest loop: over the images."""
    listing = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", listing, re.MULTILINE
    )
    labels, place = {}, 0
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = place
        elif re.match(r"^\s*/\*[0-9a-f]{4,}\*/", line):
            place += 1
    loops = []
    for index, (_, mnemonic, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands)
        if mnemonic.startswith("BRA") and target and labels.get(target[0], index + 1) < index:
            loops.append((labels[target[0]], index + 1))
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return [mnemonic.split(".")[0] for _, mnemonic, _ in instructions[start:end]]


def instructions_an_element(case, dtype="BFloat16"):
    """Return the instructions of a warp for 32 values of a channel and position, every branch counted once."""
    text = COUNTED.format(type=dtype, **{**case._asdict(), "is_whole": str(case.is_whole).lower()})
    with tempfile.TemporaryDirectory() as folder:
        cubin, _ = compile_source(text, folder, 90)
        return an_element(longest_loop(cubin), case.channels, case.chunk)


def an_element(instructions, channels, chunk):
    """Return how many instructions of a warp, which has 64 channels of a chunk, are for 32 values."""
    warps = -(-channels // 64)
    return len(instructions) * LANES * warps / (channels * chunk)


def backward_counts(channels, chunk, dtype="BFloat16"):
    """Return registers, spilled bytes and instructions of a kernel of the backward pass, as it is in the library.

    The instructions, every branch counted once, are None where nvdisasm is missing.
    """
    rank_blocks = -(-channels // 256)
    text = BACKWARD_COMPLETE.format(type=dtype, rank_blocks=rank_blocks, chunk=chunk, channels=channels)
    with tempfile.TemporaryDirectory() as folder:
        cubin, report = compile_source(text, folder, 90)
        instructions = an_element(longest_loop(cubin), channels, chunk) if disassembler() else None
    return *resources_in(report), instructions


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not found"),
]


@pytest.mark.parametrize("dtype", ["BFloat16", "Half"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.channels}-{case.chunk}")
def test_kernels_hold_their_values_in_registers(case, dtype):
    assert resources(case, 90, dtype)[1] == 0


@pytest.mark.parametrize("dtype", ["BFloat16", "Half"])
@pytest.mark.parametrize(("channels", "chunk", "most_spilled", "most_instructions"), BACKWARD)
def test_kernels_of_the_backward_pass(channels, chunk, most_spilled, most_instructions, dtype):
    _, spilled, instructions = backward_counts(channels, chunk, dtype)
    assert spilled <= most_spilled
    assert dtype != "BFloat16" or instructions is None or instructions <= most_instructions


@pytest.mark.skipif(disassembler() is None, reason="nvdisasm is not found")
@pytest.mark.parametrize(("case", "most"), [(Case(448, 9, True, 1), 53), (Case(320, 16, False, 8), 60)], ids=str)
def test_instructions_of_a_warp(case, most):
    assert instructions_an_element(case) <= most


def main():
    """Print the registers of every kernel for the architectures at hand, and its instructions on sm_90."""
    architectures = (80, 89, 90, 120)
    print("| D | C | " + " | ".join(f"sm_{architecture}" for architecture in architectures) + " | instructions |")
    for case in CASES:
        registers = [resources(case, architecture) for architecture in architectures]
        shown = " | ".join(f"{used}" + (f" ({spilled} B spilled)" if spilled else "") for used, spilled in registers)
        print(f"| {case.channels} | {case.chunk} | {shown} | {instructions_an_element(case):.1f} |")
    for channels, chunk, *_ in BACKWARD:
        registers, spilled, instructions = backward_counts(channels, chunk)
        print(f"| {channels} | {chunk} | {registers} ({spilled} B spilled) | {instructions:.1f} |")


if __name__ == "__main__":
    main()
