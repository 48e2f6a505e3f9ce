# `make demo` and `make test` need python3 (3.10 to 3.12) with venv and pip, and nothing else: the first of them
# builds the environment. Nothing is fetched but packages from the package index.

PYTHON ?= python3
WORKERS ?= 2
BENCHMARKS ?= benchmarks.rounding benchmarks.quality benchmarks.oneshot_cost benchmarks.sensitivity_cost benchmarks.load_time \
	benchmarks.gguf_quality benchmarks.gguf_export

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := quantize,autoround,gguf,plot,dev
TORCH := $(shell grep '^torch==' constraints.txt)

# the models and the text are in the repository, so that a name taken for one on a hub is a mistake
export HF_HUB_OFFLINE := 1
# its threads cannot survive the fork of a data loader, and warn about it each time
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast lint format bench bench-quality clean

help:
	@echo "make demo       quantize the small model in examples/ and compare it with its original"
	@echo "make test       lint, then every test"
	@echo "make test-fast  the tests that take a few seconds at most"
	@echo "make lint       ruff and mypy; make format lets ruff rewrite the files"
	@echo "make bench      measure: $(BENCHMARKS)"
	@echo "make bench-quality  only divergence against bytes, beside K-quants and GPTQ: the table and plot of the README"
	@echo "make venv       only build the environment in $(VENV)"
	@echo "make clean      remove caches and build products, but not $(VENV)"

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

demo: $(INSTALLED)
	$(BIN)/srd demo

# One thread per worker: the models in the tests are too small for two threads to gain anything, and workers that
# each start one thread per core slow one another down. Files stay whole, so that module fixtures are built once.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quality: $(INSTALLED)
	$(BIN)/python -m benchmarks.quality $(QUALITY)

bench: $(INSTALLED)
	set -e; for module in $(BENCHMARKS); do echo "== $$module"; $(BIN)/python -m $$module; done

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
