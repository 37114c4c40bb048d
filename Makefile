# Everything sets itself up: make demo, make test, make test-vllm, make test-gateway, make test-ray,
# make train-demo, make loop-demo, make bench-dedup.

SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Files of tests beside each other: most of a test's time is waiting.
BESIDE ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo setup test test-fast environments test-vllm test-gateway test-ray ray lint train-demo loop-demo \
        bench bench-dedup crash clean

demo: setup
	$(BIN)/woolmill generate --target 20 --out runs/demo
	$(BIN)/woolmill export runs/demo --format alpaca -o runs/demo/alpaca_data.json

setup: .venv/.ready
	@for model in smollm2 minilm en-core-web-sm; do \
	  $(BIN)/woolmill models fetch $$model > /dev/null || exit; done

# torch first: a later resolver would otherwise choose a build with CUDA.
.venv/.ready: pyproject.toml constraints.txt
	@echo "installing what is needed into .venv, which takes some minutes and says nothing"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[local,train,report,view,tiktoken,dev]'
	touch $@

# What tests need of the system: a browser for pages, strace for injected disk errors.
.PHONY: tools
tools:
	@command -v chromium > /dev/null && command -v strace > /dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium strace > /dev/null \
	    || echo "install chromium and strace: the tests of pages and disk errors need them"; }

test: setup tools lint
	$(BIN)/pytest $(BESIDE) -m "not vllm and not gateway and not ray and not gpu and not network"

# About a minute, for the time while one works: whatever starts runs, processes, models or browsers is
# marked slow.
test-fast: .venv/.ready lint
	$(BIN)/pytest -q $(BESIDE) -m "not slow and not vllm and not gateway and not ray and not gpu and not network"

lint: .venv/.ready
	$(BIN)/ruff check -q
	$(BIN)/ruff format -q --check
	$(BIN)/mypy

# Those of their own that the tests below need; each of these makes its own where it is missing.
environments: environment-vllm environment-gateway environment-ray

environment-%: setup
	bash scripts/setup-$*.sh

test-vllm: setup
	bash scripts/setup-vllm.sh
	WOOLMILL_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/pytest -m vllm

test-gateway: setup
	bash scripts/setup-gateway.sh
	WOOLMILL_GATEWAY_PYTHON=$(CURDIR)/.venv-gateway/bin/python $(BIN)/pytest -m gateway

test-ray: setup
	bash scripts/setup-ray.sh
	WOOLMILL_RAY_PYTHON=$(CURDIR)/.venv-ray/bin/python $(BIN)/pytest tests/ray -m "not slow"

# With those that take minutes, and with a real vLLM where make test-vllm has built its environment.
ray: setup
	bash scripts/setup-ray.sh
	WOOLMILL_RAY_PYTHON=$(CURDIR)/.venv-ray/bin/python \
	  $(patsubst %,WOOLMILL_VLLM_PYTHON=%,$(wildcard $(CURDIR)/.venv-vllm/bin/python)) $(BIN)/pytest tests/ray

train-demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash trainer/demo.sh

loop-demo: setup
	$(BIN)/woolmill loop --config engine/data/loop_demo.toml
	$(BIN)/woolmill report runs/loop-demo -o runs/loop-demo/rounds.html --overwrite
	$(BIN)/python -m trainer.sample --model "$$(ls -dt runs/loop-demo/round-*/model/* | head -1)"

bench-setup: setup
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'

bench-dedup: bench-setup
	$(BIN)/python -m benchmarks.bench_dedup

crash: setup
	$(BIN)/python -m tests.crash
	$(BIN)/python -m tests.crash.loops

clean:
	rm -rf .venv .venv-vllm .venv-gateway .venv-ray runs
