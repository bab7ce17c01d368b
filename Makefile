# The commands of the README. Every target sets up what it needs; `make setup` is quick once done.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: help setup rootfs images up demo test check bench
help:
	@echo "make demo | up | test | check | bench | bench-NAME   (NAME: import shared load parallel build save run read chown memory many reread convert lazy local bytes storage second)"

setup:
	@$(PYTHON) packaging/prepare.py

rootfs: setup
	@$(VENV)/python -m tests.support.rootfs

# What the tests need; the benches that need more versions make them by themselves.
images: setup
	@$(VENV)/python -m tests.support.appimages 1

up: setup
	@exec $(VENV)/python packaging/up.py

demo: rootfs
	@exec $(VENV)/python -m bench.demo

test: rootfs images
	@exec $(VENV)/python -m tests.support.run

check: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/lint-imports
	$(VENV)/python -m pytest -q -n auto -m "not dockerd and not slow" tests/unit

bench: rootfs
	@exec $(VENV)/python -m bench

bench-%: rootfs
	@exec $(VENV)/python -m bench $*
