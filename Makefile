# `make demo` and `make test` set everything up by themselves; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
STAMP := $(VENV)/.installed
PACKAGE := .[torch,mlx,mpi,lora,serve,dev]
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install lock demo test test-ci test-sweeps test-slow test-all test-gpu test-versions test-oldest test-newest bench docs lint clean

install: $(STAMP)

# The lock constrains pip, so that pip still chooses between the builds of a release (torch with or without CUDA).
$(STAMP): pyproject.toml $(LOCK) | $(BIN)/python
	@echo "[2/3] Installing the locked pip and setuptools"
	@$(PIP) install --quiet --constraint $(LOCK) pip setuptools
	@echo "[3/3] Installing Partita and its dependencies in the versions of $(LOCK) (one to three minutes)"
	@$(PIP) install --constraint $(LOCK) --no-build-isolation --editable '$(PACKAGE)'
	@touch $@
	@echo "Installed. Start with: $(BIN)/partita --help  (or activate it: source $(BIN)/activate)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Partita needs Python 3.11 or newer; name one with PYTHON=/path/to/python3 make ..."; exit 1; }
	@echo "[1/3] Creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "No virtual environment could be created. On Debian: apt-get install python3-venv"; exit 1; }

# Renew the lock: the newest release of every dependency that pyproject.toml allows, for every Python and platform.
lock: | $(BIN)/python
	@test -x $(BIN)/uv || $(PIP) install --quiet --constraint $(LOCK) uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	  --no-python-downloads --all-extras pyproject.toml --output-file $(LOCK)

demo: install
	$(BIN)/python -m partita demo

# Four workers on two cores, since many tests wait for processes that start or for limits that pass.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test: install
	$(PYTEST)

# Long tests, most of which start processes: those of the slow ones that CI runs.
test-ci: install
	$(PYTEST) -m ci

# Every family of transformers and mlx-lm: equal, or refused with the expected reason. Each test is one process's, so both
# workers share them.
SWEEPS := tests/torch/test_sweep.py tests/mlx/test_sweep.py tests/mlx/test_stage_sweep.py

test-sweeps: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist load -m 'slow or not slow' $(SWEEPS)

test-slow: install
	$(PYTEST) -m slow

test-all: install
	$(PYTEST) -m 'slow or not slow'

test-gpu: install
	$(BIN)/python -m pytest -n 0 -m gpu -rs tests/gpu

# The part of the tests that meets transformers, mlx-lm, torch and peft, with the oldest and the newest releases that
# pyproject.toml allows, each in an environment of its own.
VERSION_TESTS := tests/torch/test_models.py tests/torch/test_forward.py tests/torch/test_peft_format.py \
  tests/torch/test_internals.py tests/cli/test_library_messages.py \
  tests/mlx/test_models.py tests/mlx/test_load.py tests/mlx/test_generate.py tests/mlx/test_internals.py
VERSIONS := python -c 'import importlib.metadata as m; print(*(f"{p} {m.version(p)}" for p in ("torch", "transformers", "peft", "mlx", "mlx-lm")), sep=", ")'

test-versions: test-oldest test-newest

test-oldest: $(VENV)-oldest/.installed
	@echo "The oldest allowed releases: $$($(VENV)-oldest/bin/$(VERSIONS))"
	$(VENV)-oldest/bin/python -m pytest -W ignore::DeprecationWarning $(VERSION_TESTS)

test-newest: $(BIN)/python
	@test -x $(VENV)-newest/bin/python || $(BIN)/python -m venv $(VENV)-newest
	@echo "Installing the newest allowed releases into $(VENV)-newest"
	@$(VENV)-newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip setuptools
	@$(VENV)-newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager \
	  --no-build-isolation --editable '$(PACKAGE)'
	@echo "The newest allowed releases: $$($(VENV)-newest/bin/$(VERSIONS))"
	$(VENV)-newest/bin/python -m pytest $(VERSION_TESTS)

$(VENV)-oldest/.installed: pyproject.toml | $(STAMP)
	@test -x $(VENV)-oldest/bin/python || $(BIN)/python -m venv $(VENV)-oldest
	@echo "Installing the oldest allowed releases into $(VENV)-oldest"
	@$(BIN)/uv pip compile --quiet --resolution lowest-direct --no-python-downloads --python $(BIN)/python --all-extras \
	  pyproject.toml --output-file $(VENV)-oldest/requirements.txt
	@$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint $(VENV)-oldest/requirements.txt pip setuptools
	@$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint $(VENV)-oldest/requirements.txt --no-build-isolation --editable '$(PACKAGE)'
	@touch $@

BENCH_STAMP := $(VENV)/.installed-bench

bench: $(BENCH_STAMP)
	$(BIN)/python -m bench

$(BENCH_STAMP): $(STAMP)
	@echo "Installing what the benchmarks compare with"
	@$(PIP) install --quiet --constraint $(LOCK) --no-build-isolation --editable '.[bench]'
	@touch $@

# The site is in build/site. It refers to nothing outside of it, and building it needs no network.
DOCS_STAMP := $(VENV)/.installed-docs

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	@echo "Installing what builds the documentation"
	@$(PIP) install --quiet --constraint $(LOCK) --no-build-isolation --editable '.[docs]'
	@touch $@

lint: install
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs build
