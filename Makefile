# Each target sets up what it needs: a virtual environment in .venv with the tested versions of requirements.lock.
VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
STAMP := $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test test-all faults lab docs bench bench-gpu lock clean

$(STAMP): requirements.lock settings.ini pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --compile-bytecode -r requirements.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)       ## images to report, offline, in runs/demo
	$(VENV)/bin/blip3o_demo

test: $(STAMP)       ## notebooks, modules, commands; without what tests/long.py lists
	$(PY) -m pytest $(TESTS)

test-all: $(STAMP)   ## the same with what takes long
	$(PY) -m pytest -m "not slow" $(TESTS)

faults: $(STAMP)     ## every fault in its full number; the table of nbs/reliability.ipynb is made of it
	$(PY) -m pytest $(or $(TESTS),tests) -m fault --faults nbs/faults.json

lab: $(STAMP)        ## the notebooks in JupyterLab
	$(VENV)/bin/jupyter lab nbs

docs: $(STAMP)       ## the site, in _docs
	VENV=$(VENV) bash docs.sh

bench: $(STAMP) runs/demo/checkpoint ## speed beside peers and the machine's own ceilings: PARTS="steps sampling" for some of it
	$(PY) benchmarks/bench.py $(PARTS) --device cpu

bench-gpu: $(STAMP) runs/demo/checkpoint ## the same on a CUDA device
	$(PY) benchmarks/bench.py $(PARTS) --device cuda

runs/demo/checkpoint:
	$(MAKE) demo

lock: ## tested versions, from settings.ini
	$(PYTHON) -m venv $(VENV) && $(PY) -m pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info _docs _proc
