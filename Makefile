# Every target sets up what it needs: a virtual environment in .venv with pinned packages, and the compiled package in it.

PYTHON ?= python3
BIN := .venv/bin
CSRC := $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help setup docs gpu bench bench-deepmd study race soak demo test test-cpp test-install test-deepmd dist check-floors lint check format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: .venv/.built  ## .venv with everything, compiled

.venv/.installed: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("rlekf_ext needs Python 3.10 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/.built: .venv/.installed pyproject.toml setup.py CMakeLists.txt $(CSRC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/rlekf info
	@touch $@

demo: setup  ## train NaCl by RLEKF and by Adam for the same time (1 minute), table and pictures in demo/
	$(BIN)/python examples/demo.py

test: setup test-cpp  ## all tests
	$(BIN)/python -m pytest

test-cpp: setup
	@$(BIN)/cmake -S . -B build/cpp -G Ninja -DRLEKF_TESTS=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DTORCH_DIR=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') > .venv/cpp.log 2>&1 || (cat .venv/cpp.log; false)
	@$(BIN)/cmake --build build/cpp --target all_tests
	@$(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error

test-install:  ## pip install in a fresh environment: with and without build isolation, of an sdist, and without torch
	.ci/test_install $(PYTHON)

dist:  ## the packages to release, in dist/: an sdist, and a manylinux wheel that trains in fresh environments
	.ci/dist $(PYTHON)

check-floors:  ## the tests with the oldest Python and the oldest packages that pyproject.toml admits
	.ci/check_floors $(PYTHON)

test-deepmd: .venv-deepmd/.built  ## the plugin in the real dp: train, restart, LKF parity, LAMMPS (makes .venv-deepmd: 6 GB of disk; 20 minutes)
	.venv-deepmd/bin/pytest -m deepmd python_tests/deepmd

.venv-deepmd/.installed:
	@echo "test-deepmd: .venv-deepmd will take about 6 GB of disk and a download of 3 GB (deepmd-kit 3.2.0, torch 2.11.0)."
	$(PYTHON) -m venv .venv-deepmd
	.venv-deepmd/bin/python -m pip install --quiet --disable-pip-version-check 'deepmd-kit[torch,lmp]==3.2.0' torch==2.11.0 nvidia-cuda-runtime-cu12==12.9.79 pytest \
	    $$(grep -E '^(cmake|ninja|pybind11|tqdm|h5py)==' requirements-dev.txt) 'setuptools>=77,<82'
	@touch $@

.venv-deepmd/.built: .venv-deepmd/.installed pyproject.toml setup.py CMakeLists.txt rlekf_ext_deepmd.py $(CSRC) $(wildcard rlekf_ext/*.py rlekf_ext/*/*.py rlekf_ext/*/*/*.py)
	PATH=$(CURDIR)/.venv-deepmd/bin:$$PATH .venv-deepmd/bin/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --no-deps .
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

gpu:  ## on a machine with a GPU, with a python3 that has torch: build, timings, profile, sanitizers; tests, benchmark, training; OUT=folder, CALL=first or second
	$(if $(CALL),,.ci/gpu $(PYTHON) $(or $(OUT),gpu_results) first; )\
	.ci/gpu $(PYTHON) $(or $(OUT),gpu_results) $(or $(CALL),second)

bench: .venv/.bench  ## the filter step against naive torch and BLAS (15 minutes): rows and pictures
	$(BIN)/python benchmarks/bench_step.py
	$(BIN)/python benchmarks/plot_step.py

.venv/.bench: .venv/.built requirements-bench.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

study: setup  ## the paper's study on the DFT sets in DATA=folder (at most 2 hours, continues where it stopped): rows, tables, pictures
	$(BIN)/python benchmarks/study.py --data $(or $(DATA),examples)
	$(BIN)/python benchmarks/plot_study.py

race: .venv/.bench  ## RLEKF against first-order rivals by time, on the DFT sets in DATA=folder (hours, continues where it stopped)
	$(BIN)/python benchmarks/race.py --data $(or $(DATA),examples)
	$(BIN)/python benchmarks/plot_race.py

bench-deepmd: .venv-deepmd/.built  ## the same by the real dp: Adam, HybridMuon, LKF, RLEKF, on copper in DATA=folder (80 minutes): rows
	.venv-deepmd/bin/python benchmarks/race_deepmd.py --data $(or $(DATA),examples)

soak: setup  ## the long tests (30 minutes): fuzzing, 200 kills, drift over 20 000 and 100 000 steps against long double: rows
	$(BIN)/python -m pytest -m soak -s
	$(BIN)/python benchmarks/bench_accuracy.py
	$(BIN)/python benchmarks/bench_accuracy.py --size 48 --steps 100000
	$(BIN)/python benchmarks/bench_storage.py
	$(BIN)/python benchmarks/plot_step.py

# No --quiet: mkdocs then counts no warnings, and --strict stops at none.
docs: .venv/.docs  ## docs/options.md and docs/input.md from the tables of options, then the site in build/site
	$(BIN)/python -c 'from rlekf_ext.options import page; print(page(), end="")' > docs/options.md
	$(BIN)/python -c 'from rlekf_ext.potential.input import page; print(page(), end="")' > docs/input.md
	$(BIN)/mkdocs build --strict

.venv/.docs: .venv/.built requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

check: lint test  ## what CI runs first: ruff, mypy, clang-format, tests

format: setup  ## rewrite sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

clean:  ## remove what make made
	rm -rf .venv .venv-deepmd build dist demo rlekf_ext/*.so *.egg-info
