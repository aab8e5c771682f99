# make demo   train Hope and a Transformer++ on two centuries of speeches, evaluate both, write a report (six minutes on two quiet cores)
# make test   the test suite            make check   lint, types, import contracts, spelling
# make gpu    check and time the memories' kernels on a CUDA machine, eight minutes
# make bench  speed beside peers, memory  make learn   what small models can learn (hours)      make clean   remove the environment and everything the demo wrote

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

export MPLBACKEND := Agg

.PHONY: demo test check bench gpu learn clean

demo: $(VENV)/.core
	$(BIN)/nested-lm campaign configs/campaign/demo.yaml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell src tests docs configs README.md CHANGELOG.md CONTRIBUTING.md TODO.md

bench: $(VENV)/.core
	$(BIN)/python -m benchmarks.speed --peers --page docs/benchmarks.md
	$(BIN)/python benchmarks/streaming.py --lengths 8192 65536

gpu: $(VENV)/.core
	$(PIP) -e '.[gpu]'
	$(BIN)/python -m benchmarks.gpu --minutes $(or $(MINUTES),8)

learn: $(VENV)/.core
	$(BIN)/python -m benchmarks.learning --page docs/learning.md

clean:
	rm -rf $(VENV) artifacts dist build

# torch goes first: with it in place no other requirement can pull a different build.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	@touch $@
