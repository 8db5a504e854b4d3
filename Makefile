# The menu. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test coverage reference soak test-fresh test-cluster cluster cluster-stop check bench bench-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: $(VENV)/.quickstart  ## train a small ResNet on real digits by the whole recipe
	@$(BIN)/harness data digits data/digits
	@# one rank a GPU, at most the recipe's 8 workers; two ranks on a machine without GPUs
	$(BIN)/torchrun --nproc-per-node $$($(BIN)/python -c 'import torch; print(min(torch.cuda.device_count(), 8) or 2)') \
		-m harness train configs/quickstart.yaml --resume
	@$(BIN)/harness report runs/quickstart --to runs/quickstart/report.html

test: $(VENV)/.test  ## the whole test suite
	@# tests mostly wait for processes that start: three files at a time suit two cores
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.test  ## the suite, and which lines it ran in its own and in all other processes
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -m 'not soak and not cluster and not counts_files' \
		-n 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet && $(BIN)/coverage html --quiet -d build/coverage/html
	$(BIN)/coverage report | tail -n 40

soak: $(VENV)/.test  ## faults by the hundred, an hour or more
	$(BIN)/python -m pytest -m soak -s --timeout 0

test-fresh:  ## both commands of the README in a minimal Debian 12 (root, mmdebstrap)
	@$(PYTHON) -m tests.fresh_machine

test-cluster: $(VENV)/.test  ## the launcher on a throwaway SLURM (root, slurm-wlm, munge, iproute2)
	@# scenarios wait more than they work: three of them at a time, on a cluster each
	$(BIN)/python -m pytest -m cluster tests/cluster -n 3 --dist worksteal -rs --durations=5

cluster: $(VENV)/.test  ## start that SLURM to try things on: four nodes with two pretended GPUs each
	@$(BIN)/python -m tests.cluster.throwaway start

cluster-stop:  ## stop it
	@$(BIN)/python -m tests.cluster.throwaway stop

check: $(VENV)/.test  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: $(VENV)/.quickstart  ## write docs/config.md and configs/schema.json from the config's schema
	$(BIN)/harness config --markdown > docs/config.md
	$(BIN)/harness config --json-schema > configs/schema.json

bench: $(VENV)/.bench  ## what this machine can measure (IMAGES=FOLDER of JPEGs for the loaders)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks $(if $(IMAGES),--images $(IMAGES))

bench-check: $(VENV)/.bench  ## whether a ratio measured by make bench is worse than the committed one
	$(BIN)/python -m benchmarks.check

clean:  ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

install: $(VENV)/.quickstart  ## create .venv and install what the main job needs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed, $(PYTHON) is older; set PYTHON=python3.x"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: Python's venv module is missing; install it: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: setup.py | $(BIN)/python
	@echo "installing into $(VENV): about 3.4 GB of downloads the first time (6.4 GB on disk), most of it PyTorch's CUDA build"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[quickstart]'
	@touch $@

$(VENV)/.bench: setup.py $(VENV)/.quickstart
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench,quickstart]'
	@touch $@

$(VENV)/.test: setup.py | $(BIN)/python
	@echo "installing into $(VENV): about 3.4 GB of downloads the first time (6.4 GB on disk), most of it PyTorch's CUDA build"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.quickstart
