# Everything on a fresh machine: `make quickstart` and `make test`. Both share one environment, .venv, which is made again
# only when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Threads spin while they wait for each other. By default that goes on so long that training can take ten times as long where
# another program has one of the processors; so short it costs a twelfth on a quiet one.
export GOMP_SPINCOUNT ?= 3000

.PHONY: quickstart cifar10-mini test test-faults test-long lint docs wheel clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python is %d.%d, but 3.11 or newer is needed: make PYTHON=...' % sys.version_info[:2])"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

quickstart: $(VENV)/ready
	$(BIN)/jcdp quickstart --output runs/quickstart

# The same on real CIFAR-10: `make cifar10-mini DATA=path/to/cifar10`, a folder with train and test Parquet files.
cifar10-mini: $(VENV)/ready
	$(BIN)/jcdp quickstart --preset cifar10-mini --data $(DATA) --output runs/cifar10-mini

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Tests run in two processes of one thread each: small networks gain nothing from more threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(VENV)/ready
	$(BIN)/python -m pytest -m long tests/purify/test_faults.py

test-long: $(VENV)/ready
	$(BIN)/python -m pytest -m long

# The documentation as a site, in build/site.
docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

# A wheel, and the quickstart from it in an environment that has nothing else: 6 GB, and minutes on a fast network.
wheel: $(VENV)/ready
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && venv/bin/jcdp quickstart --preset smoke --output smoke

clean:
	rm -rf $(VENV) build dist *.egg-info
