# The project's own environment is .venv; PYTHON makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its operators with the `ninja` that it finds on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all test-faults test-slurm soak test-arch compatibility test-gpu bench-gpu gpu-environment wheels lint arguments docs format bench bench-save scaling clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## make .venv with pinned versions, and the -m option of the deepspeed launcher in it

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m zero_sft.launcher enable
	@touch $@

demo: setup ## fine-tune a real chat model on the sample conversations
	$(BIN)/python examples/demo.py

test: setup ## the tests that a contributor runs: under 10 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup older-readers ## the tests that `make test` omits: whole jobs, all cases of a table, exports opened in transformers 4
	$(BIN)/python -m pytest -m "slow and not gpu and not slurm"

test-faults: setup ## killed ranks, full disks, hostile files: under 20 minutes
	$(BIN)/python -m pytest -m "not gpu" tests/faults

test-slurm: setup ## jobs on a real SLURM of two nodes, which the tests start; needs root, slurm-wlm and munge
	$(BIN)/python -m pytest -m slurm tests/slurm

soak: setup ## the same for two hours: 50 kills, 100,000 hostile files; writes docs/reliability.md
	$(BIN)/python -m tests.faults --kills 50 --cases 100000 --write docs/reliability.md

test-all: older-readers test test-slow ## every test that needs no GPU

# transformers 4 in an environment of its own, which finds all that is not in it (torch) in .venv.
.PHONY: older-readers
older-readers: .venv-4/.installed

.venv-4/.installed: constraints-4.txt $(STAMP)
	$(BIN)/python -m venv --without-pip --clear .venv-4
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-4/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(BIN)/python -m pip --python .venv-4/bin/python install --quiet --no-deps -r constraints-4.txt
	@touch $@

test-arch: setup ## every causal LM type of transformers against plain loading; writes docs/architectures.md
	$(BIN)/python -m tests.sweep --write docs/architectures.md

compatibility: setup ## every set-up of ZeRO-3 with every method and caller; writes docs/compatibility.md, in half an hour
	$(BIN)/python -m tests.compatibility --write docs/compatibility.md

# What runs on GPUs: .venv, or, where a folder of wheels was brought, an environment on top of the torch of GPU_PYTHON.
GPU_PYTHON ?= python3
WHEELS ?= wheels
GPU_BIN := $(if $(wildcard $(WHEELS)/*.whl),.venv-gpu/bin,$(BIN))

gpu-environment: $(if $(wildcard $(WHEELS)/*.whl),.venv-gpu/.installed,setup)

.venv-gpu/.installed: $(wildcard $(WHEELS)/*.whl) benchmarks/gpu/environment.py
	$(GPU_PYTHON) benchmarks/gpu/environment.py $(WHEELS) .venv-gpu
	@touch $@

test-gpu: gpu-environment ## on a machine with GPUs: loads onto them, packing, training, as many ranks as there are
	ZERO_SFT_TEST_DEVICES=1 $(GPU_BIN)/python -m pytest -m gpu tests/gpu

bench-gpu: gpu-environment ## test-gpu, load, training and memory on one GPU in 8 minutes; writes docs/gpu.md
	$(GPU_BIN)/python -m benchmarks.gpu --write docs/gpu.md

wheels: setup ## what bench-gpu needs next to torch, for a machine without a network: wheels/
	$(BIN)/python -m benchmarks.gpu.wheels --folder $(WHEELS)

lint: setup ## format, lint, types, import contracts
	$(BIN)/ruff format --check zero_sft tests testing benchmarks examples
	$(BIN)/ruff check zero_sft tests testing benchmarks examples
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

arguments: setup ## the table of inherited arguments that --help shows, for the installed TRL and transformers
	$(BIN)/python -c "from zero_sft.arguments.specifications import write_table; write_table()"

docs: setup ## the documentation as a site in site/, with every link checked; writes docs/arguments.md
	$(BIN)/python docs/generate_arguments.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "written: site/index.html"

format: setup ## put the code into the project's format
	$(BIN)/ruff format zero_sft tests testing benchmarks examples
	$(BIN)/ruff check --fix zero_sft tests testing benchmarks examples

bench: setup ## load time, traffic and memory beside the bare read and other loaders; about an hour
	$(BIN)/python -m benchmarks.load --write docs/benchmarks.md

bench-save: setup ## save, resume and export beside DeepSpeed's own and bare writes; half an hour
	$(BIN)/python -m benchmarks.save --write docs/benchmarks.md

scaling: setup ## what published models need on 8 to 1,024 GPUs; writes docs/scaling.md
	$(BIN)/python -m zero_sft.estimate --model_name_or_path shipped --world_size 8 64 256 1024 \
		--model_max_length 4096 --per_device_train_batch_size 1 --markdown docs/scaling.md

clean: ## remove .venv and what was built
	rm -rf $(VENV) .venv-4 .venv-gpu $(WHEELS) build dist site *.egg-info .pytest_cache .ruff_cache
