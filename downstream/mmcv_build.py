"""Builds and installs mmcv with the operators that our models use: ``python -m downstream.mmcv_build``.

mmcv's own build compiles every operator it has, 78 files for the CPU and 60 more for a GPU; our seven models use
three operators. Here only the sources of these are left in a copy of mmcv's source distribution, and mmcv's own build
does the rest. Every other operator keeps its name in Python and raises an error that says how to get it.

The copy stays until mmcv is installed, so that a build that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from model.command import CommandError, exit_code
from model.files import replacing_folder

__all__ = ["keep_operators", "main"]

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-openmmlab.txt"
PACKAGE = "onedl-mmcv"
OPERATORS = ("nms", "roi_align", "focal_loss")
ALL = "all"

SOURCES = Path("mmcv", "ops", "csrc", "pytorch")
FOLDERS = ("", "cpu", "cuda")  # below it, of the files that mmcv's build may compile
# These name all operators: what binds them to Python, and what binds their CUDA kernels to them.
BINDINGS = (Path("pybind.cpp"), Path("cuda", "cudabind.cpp"))
ALWAYS = {"info", *(path.stem for path in BINDINGS)}
DECLARATION = re.compile(r"^(?P<head>[A-Za-z_][\w:<>,&* \n]*?\b(?P<name>\w+)\([^;{}()]*\));", re.MULTILINE)

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
FROM_SOURCE = ("--no-build-isolation", "--no-deps", "--no-cache-dir")
NINJA_STEP = re.compile(r"\s*\[(?P<done>\d+)/(?P<wanted>\d+)\] .* -o (?P<object>\S+)")
LOG_LINES = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and install; the exit code is 0, 1 where the build failed, 2 for bad input, or 128 + signal."""
    parser = argparse.ArgumentParser(
        prog="python -m downstream.mmcv_build",
        description="Build and install mmcv, in the version of requirements-openmmlab.txt, with few of its operators.",
    )
    parser.add_argument(
        "operators",
        nargs="*",
        metavar="OPERATOR",
        help=f"beside {', '.join(OPERATORS)}: deform_conv, modulated_deform_conv and others; {ALL}: every one",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(sys.prefix, "mmcv"), help="where to build (mmcv in the environment)"
    )
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return exit_code(
        lambda: _install(parsed.folder.resolve(), parsed.operators),
        interrupted="mmcv: stopped; the same command continues",
    )


def _install(folder: Path, more: Sequence[str]) -> None:
    version = _pinned_version()
    operators = (ALL,) if ALL in more else tuple(dict.fromkeys((*OPERATORS, *more)))
    with_cuda = _with_cuda()
    stamp = " ".join((version, torch.__version__, sys.version.split()[0], "CUDA" if with_cuda else "CPU", *operators))
    if not (folder / "stamp").is_file() or (folder / "stamp").read_text() != stamp:
        with replacing_folder(folder) as aside:
            _unpack(version, aside)
            if operators != (ALL,):
                keep_operators(aside / "source" / SOURCES, operators)
            (aside / "stamp").write_text(stamp)
    if not list(folder.glob("*.whl")):
        _build(folder, with_cuda=with_cuda)
    (wheel,) = folder.glob("*.whl")
    _run([*PIP, "install", "--no-deps", "--force-reinstall", str(wheel)], folder / "install.log")
    _run([sys.executable, "-c", "import torch, mmcv._ext"], folder / "import.log")
    shutil.rmtree(folder / "source", ignore_errors=True)
    print(f"mmcv {version}: installed with {'every operator' if operators == (ALL,) else ', '.join(operators)}")


def _pinned_version() -> str:
    pin = re.search(rf"^{PACKAGE}==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise ValueError(f"{REQUIREMENTS} has no line {PACKAGE}==VERSION")
    return pin[1]


def _with_cuda() -> bool:
    """Return whether mmcv's build compiles for CUDA, as it does where there is a GPU; without nvcc it would fail."""
    return CUDA_HOME is not None and (torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1")


def _unpack(version: str, folder: Path) -> None:
    print(f"mmcv {version}: getting its sources", flush=True)
    command = [*PIP, "download", "--no-binary", ":all:", *FROM_SOURCE, "-d", str(folder), f"{PACKAGE}=={version}"]
    # The log stands outside of the folder, which is not kept where this fails.
    _run(command, folder.with_name("mmcv-download.log"))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    source.rename(folder / "source")
    archive.unlink()


def keep_operators(folder: Path, operators: Iterable[str]) -> None:
    """Leave out of mmcv's C++ sources what is not needed; what is left builds and has all the names.

    Args:
        folder: mmcv's ``ops/csrc/pytorch``, changed in place.
        operators: Names of its files, such as ``nms``.

    Raises:
        ValueError: mmcv has no such operator; the nearest is named.
    """
    sources = list(_sources(folder))
    known = {_operator(path) for path in sources} - ALWAYS
    for name in operators:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"mmcv has no operator {name}; the nearest is {near[0]}")
    wanted = {*operators, *ALWAYS}
    for path in sources:
        if _operator(path) not in wanted:
            path.unlink()
    bindings = [folder / path for path in BINDINGS]
    kept = "\n".join(path.read_text(encoding="utf-8") for path in _sources(folder) if path not in bindings)
    defined = set(re.findall(r"\b(\w+)\(", kept))
    for path in bindings:
        text = path.read_text(encoding="utf-8")
        path.write_text(DECLARATION.sub(lambda found: _with_body(found, defined), text), encoding="utf-8")


def _with_body(declaration: re.Match[str], defined: set[str]) -> str:
    """Return a function's declaration, or where no source defines it any more, a definition that raises."""
    name = declaration["name"]
    if name in defined:
        return declaration[0]
    message = f"mmcv was built without {name}; to build all of its operators: make downstream MMCV_OPERATORS={ALL}"
    return f'{declaration["head"]} {{ throw std::runtime_error("{message}"); }}'


def _sources(folder: Path) -> Iterator[Path]:
    for name in FOLDERS:
        yield from sorted(path for path in (folder / name).glob("*") if path.suffix in (".cpp", ".cu"))


def _operator(source: Path) -> str:
    return re.sub(r"_(cpu|cuda|kernel)$", "", source.stem)


def _build(folder: Path, *, with_cuda: bool) -> None:
    environment = {**os.environ, "MMCV_WITH_OPS": "1"}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", os.defpath)))
    environment.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    if not with_cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0"}
    if shutil.which("ninja", path=environment["PATH"]) is None:
        raise ValueError("ninja is not installed, which the build needs: pip install ninja")
    tree = folder / "source"
    compiled = [path for path in _sources(tree / SOURCES) if with_cuda or path.parent.name != "cuda"]
    command = [*PIP, "wheel", "--verbose", *FROM_SOURCE, "-w", str(folder), str(tree)]
    print(f"mmcv: compiling {len(compiled)} files, {environment['MAX_JOBS']} at once", flush=True)
    _run(command, folder / "build.log", environment=environment, total=len(compiled))


def _run(command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, total: int = 0) -> None:
    """Run a command, its output going to a file, and say which of ``total`` source files are done.

    Raises:
        CommandError: It failed; the message holds the end of what it said, and where the rest is.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if step := NINJA_STEP.match(line):
                    _report(step, total, time.monotonic() - start)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        end = log.read_text(encoding="utf-8").splitlines()[-LOG_LINES:]
        raise CommandError("\n".join((f"{' '.join(command[:6])} ... failed; {log} ends:", *end)))


def _report(step: re.Match[str], total: int, seconds: float) -> None:
    # ninja counts what is left to do, which after a stop is less than all.
    done = total - int(step["wanted"]) + int(step["done"])
    minutes, seconds = divmod(int(seconds), 60)
    print(f"mmcv: {done} of {total} files, {minutes}:{seconds:02d}  {Path(step['object']).stem}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
