# Every target works alone on a fresh clone: what it needs is built first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The versions that are known to work, whatever was released since.
PINS := --constraint constraints.txt
CHECKED := flwr_smartsplit simulations
# A file's tests stay together, since they share what they have set up; the files come
# in the order of tests/conftest.py, the long ones first. Some wait for Ray to start, so
# there is a worker more than cores.
PARALLEL = --numprocesses $(shell $(PYTHON) -c "import os; print(min(4, 1 + os.cpu_count()))") --dist loadfile --no-loadscope-reorder
LINT = $(BIN)/ruff format --check && $(BIN)/ruff check && \
	$(BIN)/mypy --strict $(CHECKED)
DOCS = $(BIN)/mkdocs build --strict
# The checks run beside the tests. What they find is printed as soon as they fail; pytest's
# closing line is the last one where nothing fails.
define tests
mkdir -p out; \
{ { $(LINT) && $(DOCS); } >out/checks.log 2>&1 || { cat out/checks.log; exit 1; }; } & \
checks=$$!; $(BIN)/python -m pytest $(PARALLEL) $(1); tests=$$?; \
wait $$checks || { echo "make lint or make docs fails, see above"; exit 1; }; exit $$tests
endef

# One thread: sums in a different order differ in their last bits.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
# Without an address, Ray joins any cluster it finds on the machine.
export RAY_ADDRESS = local
export RAY_USAGE_STATS_ENABLED = 0
# Under `uv run make`, Ray would copy the whole folder, .venv too, to each worker.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV = 0
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
# Set, as many images set it, each process of a test would compile the package again.
export PYTHONDONTWRITEBYTECODE =
# The theme would print a page about other software at each build.
export NO_MKDOCS_2_WARNING = 1

.DEFAULT_GOAL := help
.PHONY: help install simulate test test-all test-gpu test-matrix lint docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv and install the package for development

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PINS) --editable '.[dev]'
	@touch $@

simulate: $(INSTALLED) ## Run the quickstart simulation (ARGS="..." is passed on)
	$(BIN)/python -m simulations run quickstart $(ARGS)

test: $(INSTALLED) ## Check everything and run the tests (ARGS="-k edge" goes to pytest)
	@$(call tests,$(ARGS))

test-all: $(INSTALLED) ## Check everything and run all tests, the slow ones too
	@$(call tests,-m "not gpu and not network" $(ARGS))

test-matrix: ## Run a short suite on oldest and newest versions (KEEP=1, CORNERS="newest oldest")
	@$(PYTHON) tests/matrix.py $(ARGS)

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device, then its figures
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -q -m gpu $(ARGS)
	$(BIN)/python -m simulations.benchmarks.gpu_steps

lint: $(INSTALLED) ## Check format, style and types
	$(LINT)

docs: $(INSTALLED) ## Build the documentation into out/site
	$(DOCS)

format: $(INSTALLED) ## Format the code and repair what can be repaired
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove .venv, caches and everything that was built or run
	rm -rf .venv .venv-matrix* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
