VENV ?= .venv
PYTHON ?= python3
export VENV

.PHONY: demo test setup

# indexes a document, serves it, asks; MODEL=, PREFIX= and BUDGET= change what it runs
demo: setup
	$(VENV)/bin/python examples/demo.py

# in two processes: each starts vLLM's engines, which two cores and 8 GiB of memory have room for
test: setup
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

setup:
	$(PYTHON) tools/set_up.py
