# Everything below works in .venv, which these targets make; PYTHON picks the interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
RUNTIMES := .venv-runtimes
PY := $(VENV)/bin/python
# Tests run in processes of one thread each, a file of tests at a time; where they wait, they do not spin.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist loadfile
PY_SOURCES := run.py hubconf.py benchmarks configs data downstream loss model optim trainer util weights
CXX_SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev quickstart kernels runtimes downstream benchmark test test-all test-kernels test-runtimes fuzz mutants soak audit lint format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(PY):
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else f"{sys.executable} is Python {sys.version.split()[0]}; MobileMamba is tested with 3.10 to 3.12: make PYTHON=/path/to/python3.12 ...")'
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo 'venv failed: on Debian and Ubuntu, install python3-venv' >&2; exit 1; }

# A stamp is written when an installation is complete, so that one cut short is taken up again.
$(VENV)/.requirements: requirements.txt | $(PY)
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements-demo.txt $(VENV)/.requirements
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --no-deps -r requirements-demo.txt
	@touch $@

setup: $(VENV)/.requirements ## Install what training and testing need

setup-dev: $(VENV)/.requirements-dev ## Install what the test suite needs too

quickstart: setup ## Train and test MobileMamba-T2 on handwritten digits, in minutes on two cores
	$(PY) -m data.prepare digits data/digits
	$(PY) run.py -c configs/quickstart -m train
	@run=$$(ls -td runs/quickstart/*/ | head -n 1) && \
	$(PY) run.py -c configs/quickstart -m test model.model_kwargs.checkpoint_path="$${run}net_E.pth" && \
	echo "Logs, checkpoints and the configuration of the run: $$run"

# ninja compiles in parallel; the package is built against the environment's own torch.
kernels: setup ## Build the compiled kernels (needs a C++ compiler; CUDA too where nvcc is found)
	$(PY) -m pip install --disable-pip-version-check --progress-bar off "setuptools>=80,<82" wheel ninja
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation --force-reinstall --no-deps model/lib_mamba/kernels/selective_scan

# Operators of mmcv beside those that our models use, such as "deform_conv"; all: every one.
MMCV_OPERATORS ?=

$(VENV)/.requirements-openmmlab: requirements-openmmlab.txt requirements-downstream.txt $(VENV)/.requirements
	$(PY) -m pip install --disable-pip-version-check --progress-bar off "setuptools>=80,<82" wheel ninja packaging psutil
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -r requirements-downstream.txt
	grep -v '^onedl-mmcv' requirements-openmmlab.txt | $(PY) -m pip install --disable-pip-version-check --progress-bar off --no-deps -r /dev/stdin
	$(PY) -m downstream.mmcv_build $(MMCV_OPERATORS)
	@touch $@

# An environment beside .venv, which it sees: these want other versions of what the suite runs on.
$(RUNTIMES)/.requirements: requirements-runtimes.txt $(VENV)/.requirements-dev
	$(PY) -m venv $(RUNTIMES)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(RUNTIMES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(RUNTIMES)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps -r requirements-runtimes.txt
	@touch $@

runtimes: $(RUNTIMES)/.requirements ## Install what exporting to Core ML, LiteRT and ExecuTorch needs, into .venv-runtimes

test-runtimes: runtimes ## Run the tests of exporting to these
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUNTIMES)/bin/python -m pytest -m "slow or not slow" -k "core_ml or litert or executorch" tests/model/export/test_model_export_formats.py tests/docs/test_docs_deploy.py

downstream: $(VENV)/.requirements-openmmlab ## Install OpenMMLab for detection and segmentation; builds mmcv's operators (C++ compiler)
	@test -z "$(MMCV_OPERATORS)" || $(PY) -m downstream.mmcv_build $(MMCV_OPERATORS)

benchmark: setup-dev ## Measure speed in short runs; results go to benchmarks/results
	$(PY) -m benchmarks.network --quick
	$(PY) -m benchmarks.scan --quick
	$(PY) -m benchmarks.train_step --quick

test: setup-dev lint ## Run the checks and the test suite
	$(PYTEST)

test-all: setup-dev downstream lint ## Run the checks and every test, the slow ones and OpenMMLab's too (C++ compiler)
	$(PYTEST) -m "slow or not slow"

fuzz: setup-dev ## Try 2,000 damaged inputs of every kind, where the test suite tries 100
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) $(wildcard tests/*/test_*_fuzz.py)

# Names or patterns, such as "trainer.stop*"; all 6,000 of them take hours.
MUTANTS ?=

mutants: setup-dev ## Change the trainer, data and checkpoint code bit by bit, and see which changes no test notices
	OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run $(MUTANTS)
	$(VENV)/bin/mutmut results | grep -v ': not checked$$' || true

SOAK ?= runs/soak-$(shell date +%Y%m%d-%H%M%S)

soak: setup ## Disturb a run of two processes for 20 minutes, and compare it with one that was left alone
	PYTHONPATH=. $(PY) tests/trainer/soak.py $(SOAK)

audit: setup-dev ## Look for dangerous code, and for known vulnerabilities of what is installed
	$(PY) -m bandit -q -c pyproject.toml -r setup.py $(PY_SOURCES)
	$(PY) .ci/audit.py

test-kernels: setup-dev kernels ## Run the network's tests on the compiled kernels
	$(PY) -m model.lib_mamba.info
	$(PYTEST) tests/model

lint: setup-dev ## Check style, types and repeated blocks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy
	$(PY) -m pylint --score=n $(PY_SOURCES)

format: setup-dev ## Format every file
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

clean: ## Remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) $(RUNTIMES) .pytest_cache .ruff_cache .mypy_cache .hypothesis mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
