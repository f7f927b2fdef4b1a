# make demo and make test do everything on a fresh machine. PYTHON names another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small matrices gain nothing from threads, and two processes with two threads each fight for two cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
JOBS ?= 2

.PHONY: demo test test-all lint format docs clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The pinned packages of constraints.txt need Python 3.11 or later: make PYTHON=python3.11 ... (mogb itself runs on 3.10: pip install -e .)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[plot,metrics,quadprog,diffusion,ocr,dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mogb compare --quick --out runs/demo --overwrite
	rm -rf runs/tiny
	$(BIN)/mogb-diffusion train tiny --out runs/tiny
	@echo "Methods on toy problems:  runs/demo/*.png, runs/demo/summary.md, and on one page runs/demo/report.html"
	@echo "Five rewards, tiny model: runs/tiny/*.png, runs/tiny/samples/, and on one page runs/tiny/report.html"

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
