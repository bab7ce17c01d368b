# The commands that README.md and CONTRIBUTING.md show. Every target sets up first; that is quick once done.
PYTHON ?= python3
VENV := .venv/bin
# The stack and the tests start thousands of processes, which would compile all modules again without cached bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup rootfs images containerd up demo test test-matrix check lint quick-tests protos bench
help:
	@echo "make setup    install missing Debian packages and build .venv; every other target does so first"
	@echo "make demo     run the same steps on gearworkers and on overlayfs and compare; leaves nothing behind"
	@echo "make up       run the stack in the foreground until SIGTERM or Ctrl-C"
	@echo "make check    run linters, type checks and quick tests"
	@echo "make lint     run the linters and type checks of make check"
	@echo "make quick-tests  run the quick tests of make check"
	@echo "make test     run all tests, those on a real dockerd included"
	@echo "make protos   generate the messages of containerd's API from their .proto files"
	@echo "make test-matrix  run the tests of containerd's door on Debian testing's containerd and Docker"
	@echo "make rootfs   make the root file systems that tests and benchmarks use"
	@echo "make images   make the application images that tests use"
	@echo "make containerd  unpack a newer containerd and Docker, which tests use"
	@echo "make bench    run all benchmarks, or one with make bench-NAME, NAME being one of:"
	@echo "              import shared load parallel build save run read chown memory idle"
	@echo "              convert many reread lazy local bytes storage second"
	@echo "              unpack unpack-one growth snapshots containerd lazy-pull lazy-pull-local"
	@echo "              lazy-pull-slow shared-pull (containerd's front door)"

setup:
	@$(PYTHON) packaging/prepare.py

rootfs: setup
	@$(VENV)/python -m tests.support.rootfs

# The first version of each image, for the tests. Benchmarks make further versions themselves.
images: setup
	@$(VENV)/python -m tests.support.appimages 1

up: setup
	@exec $(VENV)/python packaging/up.py

demo: rootfs containerd
	@exec $(VENV)/python -m bench.demo

# A containerd and a Docker that know containerd's image store, for the tests.
containerd: setup
	@$(VENV)/python -m tests.support.newer_docker

test: rootfs images containerd
	@exec $(VENV)/python -m tests.support.run

# The tests wait for a part of the time; the type checker uses it.
check: setup
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line lint quick-tests

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/lint-imports

quick-tests: setup
	$(VENV)/python -m pytest -q -n auto --in-memory -m "not dockerd and not slow" tests/unit

# The tests of containerd's door on Debian testing's containerd and Docker.
test-matrix: rootfs
	@DOCKER_OF_DEBIAN=testing $(VENV)/python -m tests.support.newer_docker
	@DOCKER_OF_DEBIAN=testing $(VENV)/python -m pytest tests/e2e/test_containerd.py tests/e2e/test_containerd_crashes.py tests/e2e/test_cri.py

protos: setup
	@$(VENV)/python packaging/protos.py

bench: rootfs containerd
	@exec $(VENV)/python -m bench

bench-%: rootfs containerd
	@exec $(VENV)/python -m bench $*
