# make demo · make test · make bench · make lint — each sets up what it needs, and does it once.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
# A process a core, four at the most: each takes 2 to 4 GB.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

.PHONY: help install demo test bench lint clean

help:
	@echo "make demo    set up, train on the embedded demo data, evaluate, predict, report"
	@echo "make test    set up, run all tests"
	@echo "make bench   set up, time the losses, the step and the input pipeline"
	@echo "make lint    set up, ruff"
	@echo "make clean   remove the virtual environment, builds and demo runs"

install: $(VENV)/.ready

# torch comes first and without build isolation: the native part compiles against the torch it will
# run with. Where no compiler is found the install still succeeds, with Triton and reference ops.
# Few of the packages' modules are ever imported; Python compiles those when they are.
$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f 2>/dev/null)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d; make PYTHON=... chooses another" % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --no-compile --progress-bar on torch torchvision
	$(BIN)/python -m pip install --no-compile --quiet pybind11 ninja cmake
	$(BIN)/python -m pip install --no-compile --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/co2s-fast train --dataset demo --out $(RUNS)/demo --resume-if-exists
	$(BIN)/co2s-fast eval $(RUNS)/demo
	$(BIN)/co2s-fast predict $(RUNS)/demo --val 8 -o $(RUNS)/demo/predictions
	$(BIN)/co2s-fast report $(RUNS)/demo

test: install
	CO2S_REQUIRE_NATIVE=$(shell command -v c++ >/dev/null 2>&1 && echo 1 || echo 0) \
		$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install
	$(BIN)/python benchmarks/throughput.py

lint: install
	$(BIN)/ruff check co2s_fast kernels benchmarks tests examples setup.py

clean:
	rm -rf $(VENV) build $(RUNS)/demo *.egg-info co2s_fast/_native*.so co2s_fast/_native_build.json
