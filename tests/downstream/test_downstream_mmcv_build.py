"""The build of mmcv with few operators: what is left of its sources compiles, and says what is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from downstream import mmcv_build
from model.command import CommandError

BINDINGS = """\
#include <stdexcept>
#include <iostream>
using Tensor = float;

Tensor nms(Tensor boxes, Tensor scores,
           float overlap);
Tensor knn_forward(const Tensor &points,
                   Tensor others, int count);
void nms_rotated(Tensor boxes);
std::string get_compiler_version();

int main() {
  std::cout << nms(1, 2, 3) << get_compiler_version() << '\\n';
  try { knn_forward(1, 2, 3); } catch (const std::runtime_error &error) { std::cout << error.what(); }
}
"""
SOURCES = {
    "pybind.cpp": BINDINGS,
    "info.cpp": '#include <string>\nstd::string get_compiler_version() { return " compiled"; }\n',
    "nms.cpp": "float nms_cpu(float);\nfloat nms(float a, float scores, float b) { return nms_cpu(scores); }\n",
    "cpu/nms.cpp": "float nms_cpu(float scores) { return 10 * scores; }\n",
    "knn.cpp": "float knn_forward(const float &points, float others, int count) { return points; }\n",
    "nms_rotated.cpp": "void nms_rotated(float boxes) {}\n",
    "cuda/nms_cuda.cu": "",
    "cuda/knn_cuda.cu": "",
    "cuda/cudabind.cpp": "#include <stdexcept>\nvoid KNNForwardCUDAKernelLauncher(int b);\n",
}


@pytest.fixture
def sources(tmp_path):
    """C++ in the manner of mmcv's."""
    for name, text in SOURCES.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "csrc"


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_what_is_left_links_and_missing_operators_raise(sources, tmp_path):
    mmcv_build.keep_operators(sources, ("nms",))
    left = {"pybind.cpp", "info.cpp", "nms.cpp", "cpu/nms.cpp", "cuda/nms_cuda.cu", "cuda/cudabind.cpp"}
    assert files_of(sources) == left
    compiled = [str(sources / name) for name in left if name.endswith(".cpp")]
    subprocess.run(["c++", "-std=c++17", "-o", tmp_path / "program", *compiled], check=True)
    said = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    assert said == (
        "20 compiled\nmmcv was built without knn_forward; to build all of its operators: "
        "make downstream MMCV_OPERATORS=all"
    )
    assert "void KNNForwardCUDAKernelLauncher(int b) { throw " in (sources / "cuda/cudabind.cpp").read_text()


def test_operators_are_asked_for_by_name(sources):
    with pytest.raises(ValueError, match="mmcv has no operator nms_rotate; the nearest is nms_rotated"):
        mmcv_build.keep_operators(sources, ("nms", "nms_rotate"))
    assert files_of(sources) == set(SOURCES)
    mmcv_build.keep_operators(sources, ("knn",))
    assert "cuda/knn_cuda.cu" in files_of(sources)
    assert (
        "knn_forward(const Tensor &points,\n                   Tensor others, int count);"
        in (sources / "pybind.cpp").read_text()
    )


def test_progress_counts_what_was_done_before_a_stop(tmp_path, capsys):
    # The first two of five were done; ninja knows of the other three.
    lines = [f"  [{n}/3] c++ -MMD -c /a/{name}.cpp -o /b/csrc/{name}.o" for n, name in enumerate(("nms", "info"), 1)]
    command = [sys.executable, "-c", f"print({chr(10).join(['other', *lines])!r})"]
    mmcv_build._run(command, tmp_path / "log", total=5)
    said = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+:\d+", "TIME", line) for line in said] == [
        "mmcv: 3 of 5 files, TIME  nms",
        "mmcv: 4 of 5 files, TIME  info",
    ]


def test_a_step_that_fails_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('\\n'.join(map(str, range(100)))); raise SystemExit('no such header')"]
    with pytest.raises(CommandError, match=r"(?s)failed; .*log ends:.*\n99.*no such header") as error:
        mmcv_build._run(command, tmp_path / "log")
    assert "\n50\n" not in str(error.value)


def test_the_version_is_the_pinned_one():
    assert f"onedl-mmcv=={mmcv_build._pinned_version()}\n" in mmcv_build.REQUIREMENTS.read_text()


def test_the_installed_mmcv_has_what_the_models_use():
    operators = pytest.importorskip("mmcv._ext", reason="OpenMMLab is not installed: make downstream")
    import torch
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.5, 0.6, 0.1]), 0.5)[1].tolist() == [1, 2]
    # Every name is there, so that all of mmcv can be imported.
    assert callable(operators.knn_forward)


@pytest.mark.parametrize("missing", ["mmcv", "mmengine", "mmpretrain"])
def test_the_build_starts_while_a_part_of_openmmlab_is_missing(missing):
    program = f"import sys; sys.modules['{missing}'] = None; import downstream.mmcv_build"
    subprocess.run([sys.executable, "-c", program], cwd=mmcv_build.REQUIREMENTS.parent, check=True)
