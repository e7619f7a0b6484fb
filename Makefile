VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SCHEMA := configs/serving.schema.json

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu check schema bench

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt .ci/setup
	@VENV=$(VENV) .ci/setup
	@touch $@

demo: $(STAMP) ## Train, register and serve two digit classifiers, post real scans, print a table
	@$(BIN)/python -m models.digits.demo

test: $(STAMP) ## Run the tests, as many at a time as there are cores
	@$(BIN)/pytest -n logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

test-gpu: $(STAMP) ## Run the tests that need a CUDA GPU; fails without one
	@SERVING_TEST_GPU_REQUIRED=1 $(BIN)/pytest tests/gpu

check: $(STAMP) ## Format, lint, types, import rules, generated files, Dockerfile, scripts
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/shellcheck .ci/setup .ci/run
	@$(BIN)/serving config schema | diff -u $(SCHEMA) - \
		|| { echo "check: $(SCHEMA) is out of date; run: make schema" >&2; exit 1; }

schema: $(STAMP) ## Write the configuration's JSON Schema
	@$(BIN)/serving config schema > $(SCHEMA).new && mv $(SCHEMA).new $(SCHEMA)

bench: $(STAMP) ## Compare with a bare ASGI app and plain Ray Serve (needs wrk, ~9 minutes)
	@$(BIN)/python -m benchmarks.run
