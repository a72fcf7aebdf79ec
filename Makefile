# `make demo` and `make test` set everything up by themselves; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
STAMP := $(VENV)/.installed
PACKAGE := .[torch,mlx,mpi,lora,dev]
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install lock demo test test-slow test-all bench lint clean

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

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-all: install
	$(BIN)/python -m pytest -m 'slow or not slow'

bench: install
	$(BIN)/python -m bench

lint: install
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest runs build
