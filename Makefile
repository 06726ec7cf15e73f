# make demo, make test: everything they need is installed into .venv the first time.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CPP = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')
SOURCES := setup.py build_backend/backend.py CMakeLists.txt $(shell find csrc -type f)

# Whatever environment is active and whatever PYTHONPATH names, .venv is what runs.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

# Most tests keep one core busy, so they run in as many processes; threads that spin would starve the other process's.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal
PROCESSES ?= 2

.PHONY: demo test test-all lint format bench gpu resources clean

demo: $(VENV)/.built
	OMP_WAIT_POLICY=passive $(BIN)/python -m imagegen demo --out out # spinning threads starve each other on a busy machine

test: $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.built
	$(PYTEST)

lint: $(VENV)/.built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks run --suite ops --out benchmarks/results/local/ops.json
	$(BIN)/python -m benchmarks report benchmarks/results/local/ops.json

gpu: $(VENV)/.built
	.ci/gpu

resources: $(VENV)/.built # of every CUDA kernel: registers, shared memory, spills, matrix instructions
	$(BIN)/python tests/cuda_ahead_of_time.py

clean:
	rm -rf $(VENV) build dist out *.egg-info imagegen/_C*.so

# torch first and by itself, so that nothing below can choose another one; then what builds and tests the package.
$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel "cmake>=3.24" ninja "pybind11>=2.12"
	$(PIP) --no-build-isolation --editable ".[test,lint]"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@
