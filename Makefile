# `make demo` runs the main job, `make test` the tests; both make `.venv` first and reuse it afterwards.
PYTHON ?= python3
BIN := .venv/bin

PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo base test bench lint site package extras clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and pinned, so that nothing below brings another build of it.
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[train,bench]'
	touch $@

# The tests run every library that RoSA works with.
.venv/installed-for-tests: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/rosa demo

# Real weights, and the rows of the study on them (docs/results.md): DATA is a folder of LLM-Adapters' rows.
DATA ?= ../shared/data
base: install
	$(PIP) gguf
	$(BIN)/python -m benchmarks.smollm2.base --data $(DATA)

# A thread for each process: more would only wait for each other. A file at a time, whose fixtures are made once.
test: .venv/installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Without a GPU: small sizes, on the reference backend. On a GPU, benchmarks/gpu.sh is the one to run.
bench: install
	OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site, in site/.
site: .venv/installed-for-tests
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The sdist and the wheel, in dist/.
package: .venv/installed-for-tests
	$(BIN)/python -m build --no-isolation

# Each extra in an environment of its own; downloads them.
extras:
	PYTHON=$(PYTHON) bash tests/packaging/extras.sh

clean:
	rm -rf .venv build dist site *.egg-info
