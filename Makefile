# make demo   a rendered camera stream through real DDS into the real node, with figures at the end
# make test   lint, types, unit tests, ROS tests, parity tests
# Both bring .venv into shape first (scripts/bootstrap.py); a second run does only what is not right yet.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
RUN := $(VENV)/bin/python

# .venv is self-contained: nothing of a ROS installation or another environment may leak into it
unexport PYTHONPATH PYTHONHOME LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE
export AMENT_PREFIX_PATH := $(VENV)

.PHONY: help setup demo test lint types unit ros parity format
help:
	@sed -n 's/^# //p' Makefile

setup:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing: install Python 3.11, or name one: make PYTHON=... $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py

demo: setup
	@$(RUN) -m scripts.demo

# in this order, and none beside another: the cheap checks fail first, and memory stays bounded
test:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory ros
	@$(MAKE) --no-print-directory parity

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup
	$(RUN) -m mypy

unit ros parity: setup
	$(RUN) -m pytest test/$@ --durations=5

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
