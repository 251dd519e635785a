"""Training stays within the memory that the original needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LIMIT_KB = 1.7e6  # the original: 1.63 GB
# The peak of this very process, which neither its parent nor its children count into.
RUN_AND_TELL = """
import runpy, sys
try:
    runpy.run_path("run.py", run_name="__main__")
finally:
    status = open("/proc/self/status").read()
    print("peak", status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_t2_at_192_px_and_batch_32_trains_within_the_limit(tmp_path):
    generator = np.random.default_rng(0)
    for name, number in (("train/a", 48), ("train/b", 48), ("val/a", 1), ("val/b", 1)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for index in range(number):
            Image.fromarray(generator.integers(0, 255, (192, 192, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    arguments = f"run.py -c configs/mobilemamba/mobilemamba_t2 -m train nb_classes=2 batch_size=32 epoch_full=1 \
        warmup_epochs=0 trainer.data.num_workers_per_gpu=0 trainer.scaler=none data.root={tmp_path / 'images'} \
        trainer.checkpoint={tmp_path / 'runs'}".split()
    code = RUN_AND_TELL.replace("import runpy, sys", f"import runpy, sys; sys.argv = {arguments!r}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "top-1" in done.stdout + done.stderr, done.stderr
    peak = int(done.stdout.rsplit("peak", 1)[1])
    assert peak <= LIMIT_KB
