# Every target sets up .venv first; that takes a second when nothing changed.
SHELL := /bin/bash
VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest

.PHONY: setup demo test test-full native-test lint format bench bench-training clean

setup:
	@scripts/setup_env.sh

demo: setup
	$(VENV)/sglang-er demo

test: setup
	$(PYTEST) test

test-full: setup
	$(PYTEST) test --full

native-test: setup
	@scripts/native_test.sh

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	git ls-files -z -- '*.cpp' '*.cc' '*.h' '*.hpp' '*.cu' '*.cuh' | xargs -0r $(VENV)/clang-format --dry-run --Werror
	$(VENV)/python scripts/check_house.py

format: setup
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	git ls-files -z -- '*.cpp' '*.cc' '*.h' '*.hpp' '*.cu' '*.cuh' | xargs -0r $(VENV)/clang-format -i

bench: setup
	$(VENV)/python scripts/bench_step.py
	$(VENV)/python scripts/bench_decision.py
	$(VENV)/sglang-er bench kernels

# About an hour and a half on two cores; goes on where it was stopped. docs/training.md says what it measures.
bench-training: setup
	PYTHONPATH=examples $(VENV)/python -m grpo.study --out build/grpo

# .venv and the user's cache stay: they are remade from the lock files when those change.
clean:
	rm -rf build dist .er models-out .pytest_cache .mypy_cache .ruff_cache python/*.egg-info
	rm -f python/sglang_er/kernels/cpu/*.so
	find python test scripts -name __pycache__ -type d -prune -exec rm -rf {} +
