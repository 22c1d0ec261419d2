# make demo                             quantize a real 135M model in .venv and show what came of it
# make demo PRESET=balanced BITS=0.8    the same with other settings; ARGS="..." passes any flag of nanoquant quantize
# make demo MODEL=gemma-3-270m          the same with a model of another family
# make install                          .venv with the command nanoquant in .venv/bin, and all that demo and tests need
# make test                             lint and tests
# make proofs                           what takes minutes: several processes, another device, a server, a wheel
# make release                          wheel and sdist in dist/, after the wheel passed a smoke test without the sources
# make docs                             the API reference, in build/reference

PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
PRESET ?= fast
BITS ?= 1.0
ARGS ?=

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --constraint $(CONSTRAINTS)

PROOFS := torchao_processes tutorials serve devices compiling unfinished

.PHONY: demo test proofs docs release install
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/python recipes/demo.py --get $(MODEL) --preset $(PRESET) --bits $(BITS) $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --durations 20

proofs: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slow $(PROOFS:%=tests/test_%.py)
	$(VENV)/bin/python tests/wheel_smoke.py

release: $(VENV)/.installed
	$(VENV)/bin/python tests/wheel_smoke.py
	$(VENV)/bin/python -m build --no-isolation

docs: $(VENV)/.installed
	$(VENV)/bin/python -m sphinx -W --keep-going -d build/doctrees tutorials/reference build/reference

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV); the first time takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev,demo,eval,plots,docs,tune,serve]'
	@touch $@
