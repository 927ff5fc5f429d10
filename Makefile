# `make help` lists the commands. Each makes .venv first, where it is not there yet or the locks have changed.
#
#   PYTHON=/path/to/python   the Python 3.11 or 3.12 to make .venv with (default: the first one found)
#   DEVICE=cpu|cuda          which lock to install (default: cuda where nvidia-smi finds a GPU)
#   ARGS="..."               more arguments for pytest (make test) or the console (make demo)

# The candidates are run, not only looked up: a version manager may leave a command that does not start, and Debian's
# python3 comes without venv and pip.
CHECK := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do "$$p" -c '$(CHECK)' 2>/dev/null && echo "$$p" && break; done)
NO_PYTHON := no Python 3.11 or 3.12 with venv and pip. Debian, Ubuntu: apt-get install python3-venv; or PYTHON=/path/to/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench

help:
	@echo "make demo      the whole pipeline on two CPU cores; writes runs/demo/report.html"
	@echo "make test      all tests (ARGS=\"tests/unit -k rows\" for some of them)"
	@echo "make lint      formatting, ruff, mypy"
	@echo "make format    format the code and mend what ruff can mend"
	@echo "make bench     every benchmark against its peer, one table"
	@echo "make setup     only .venv (DEVICE=cpu or cuda to choose the lock)"

setup:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then echo "setup: $(NO_PYTHON)" >&2; exit 2; fi; \
	"$$python" requirements/install.py $(if $(DEVICE),--device $(DEVICE))

demo: setup
	.venv/bin/alignment run configs/pipelines/demo.yaml $(ARGS)

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: setup
	.venv/bin/python -m benchmarks $(ARGS)
