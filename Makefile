# Targets for users: demo, test, bench. Targets for authors: check, static, format, docs, clean. `make help` lists them.

PYTHON ?= python3
PYTEST_ARGS ?=
RUNS ?= runs
BENCH_ARGS ?=
FAULTS_ARGS ?=
MUTATE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-cuda bench faults mutate check static package extras format docs clean

help:
	@echo "make demo    learn rendered characters, beside prototypes and MAML trained for as long (no download of data)"
	@echo "make test    run the test suite"
	@echo "make test-slow  run the few full-size tests that make test leaves out, having small ones of the same properties"
	@echo "make test-cuda  everything that a user does, on a CUDA device against the CPU's numbers (three minutes)"
	@echo "make bench   measure speed and accuracy of meta-gradients, beside a plain loop and other libraries (15 minutes)"
	@echo "make faults  kill trainings, fill their disk, damage files, ask from many threads; FAULTS_ARGS='--minutes 10'"
	@echo "make mutate  change the numerical core in small places and count what the tests notice; MUTATE_ARGS='--number 60'"
	@echo "make check   everything that continuous integration runs"
	@echo "make static  the part of check that is not the test suite: format, lint, types, layers, doctests, docs"
	@echo "make package  build the wheel and the source archive, look into them, use the wheel without the checkout"
	@echo "make extras  resolve every optional extra alone, and all together (asks the package index; a few minutes)"
	@echo "make format  format the code and sort the imports"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove the virtual environment and all build products (not $(RUNS)/)"
	@echo "The first target creates $(VENV)/ with $(PYTHON); choose another one with PYTHON=python3.12."

# Each stamp marks one finished step of the set-up, so that an interrupted set-up resumes and a finished one costs nothing.

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "'$(PYTHON)' was not found: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ibaml needs Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV)/ with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# torch comes first and alone: where an index offers a build for this machine under the pinned version only, a joint
# resolution could settle for another build.
$(VENV)/.torch: constraints.txt $(VENV)/.created
	@echo "Installing torch (the largest download, some minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	@echo "Installing ibaml"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	@echo "Installing ibaml with its test tools"
	@$(PIP) -e '.[test]'
	@touch $(VENV)/.runtime $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "Installing ibaml with its test and development tools"
	@$(PIP) -e '.[test,dev]'
	@touch $(VENV)/.runtime $(VENV)/.test $@

$(VENV)/.bench: pyproject.toml $(VENV)/.torch
	@echo "Installing ibaml with what the benchmark compares it with"
	@$(PIP) -e '.[test,bench]'
	@touch $(VENV)/.runtime $(VENV)/.test $@

demo: $(VENV)/.runtime
	$(BIN)/ibaml train glyphs_5way_5shot --trainer.num-steps 400 --trainer.validate-every 400 --run-folder $(RUNS)/demo
	$(BIN)/ibaml evaluate $(RUNS)/demo --tasks 100
	$(BIN)/ibaml compare $(RUNS)/demo --baselines prototypes maml --tasks 100

# One thread a worker: small tensors gain nothing from more, and workers that compete for cores lose much. Each worker
# starts with a row of neighbours, which share fixtures, and takes over tests of slower ones when it is done.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-cuda: $(VENV)/.test
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'this torch finds no CUDA device'"
	$(BIN)/python -m pytest tests/test_cuda.py -k cuda --durations=5

# Results go to benchmarks/results/, the headline ratios into the README. For the whole grid: make bench BENCH_ARGS=--full
bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks --quiet --benchmark-enable --benchmark-columns=min,median,rounds
	$(BIN)/python -m benchmarks.user_path
	$(BIN)/python -m benchmarks.accuracy_per_cost --update-readme
	$(BIN)/python -m benchmarks.run --max-minutes 7 --update-readme $(BENCH_ARGS)

# In tests/, and so not of the package: found by that folder being on the path.
faults: $(VENV)/.test
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.faults $(FAULTS_ARGS)

mutate: $(VENV)/.test
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m campaigns.mutate $(MUTATE_ARGS)

static: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n auto --maxprocesses 8 --doctest-modules src
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

package: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/package/check.py --out dist

# Without constraints.txt, as for somebody who installs the library.
extras: $(VENV)/.dev
	@set -e; names=$$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'])"); \
	for extras in $$names "$$(echo $$names | tr ' ' ',')"; do \
		echo "ibaml[$$extras]"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --dry-run -e ".[$$extras]"; \
	done

check: $(VENV)/.dev
	@$(MAKE) --no-print-directory static
	@$(MAKE) --no-print-directory package
	@$(MAKE) --no-print-directory test

format: $(VENV)/.dev
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
