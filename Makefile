VENV ?= .venv
PYTHON ?= python3
export VENV

.PHONY: demo test setup

# indexes a document, serves it, asks; MODEL=, PREFIX= and BUDGET= change what it runs
demo: setup
	$(VENV)/bin/python examples/demo.py

test: setup
	$(VENV)/bin/python -m pytest

setup:
	$(PYTHON) tools/set_up.py
