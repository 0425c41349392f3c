# Each target does its own set-up; a second call sets nothing up again.
PYTHON ?= python3
export PYTHON

.PHONY: demo test lint format clean

demo:            ## A whole fleet on this machine. Options: make demo ARGS="--devices 5 --show-text"
	@scripts/setup demo
	@.venv/bin/fleet demo $(ARGS)

test:            ## All tests. Options: make test ARGS="tests/dssd -x"
	@scripts/setup dev
	@scripts/need-mosquitto
	@.venv/bin/python -m pytest $(ARGS)

lint:            ## Style, types and the floors of the house.
	@scripts/setup dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:           ## Forget the set-up; the models stay.
	rm -rf .venv
