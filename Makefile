# Each target does its own set-up; a second call sets nothing up again.
PYTHON ?= python3
export PYTHON

# Twice as many processes as cores, because many tests wait. Those that share what is costly to set up stay in one process
# (xdist_group). tests/conftest.py orders them, so that what takes long begins first.
PARALLEL ?= -n $(shell echo $$((2 * $$(nproc) < 12 ? 2 * $$(nproc) : 12))) --dist loadgroup --no-loadscope-reorder
# What Python compiles is kept for later runs, whatever the environment says: half a minute of `make check`.
unexport PYTHONDONTWRITEBYTECODE
FAST := not (broker or models or postgres or root or slow or exhaustive)

.PHONY: demo bench check test test-all lint docs format clean

demo:            ## A whole fleet on this machine, until Ctrl-C. Options: make demo ARGS="--devices 5 --once"
	@scripts/setup demo
	@.venv/bin/fleet demo $(ARGS)

ifeq ($(strip $(ARGS)),)
bench:           ## List the benchmarks, or set up what they need and run one: make bench ARGS="latency --outputs 1"
	@$(PYTHON) -m benchmarks
else
bench:
	@scripts/setup dev
	@scripts/need-mosquitto
	@.venv/bin/python -m benchmarks $(ARGS)
endif

check: lint      ## Before every commit: style, types, layers, and the fast tests, which need no broker and no models.
	@.venv/bin/python -m pytest $(PARALLEL) -m "$(FAST)" $(ARGS)

test:            ## What shows that all of it works here. Options: make test ARGS="tests/sampling -x"
	@scripts/setup dev
	@scripts/need-mosquitto
	@.venv/bin/python -m pytest $(PARALLEL) -m "not exhaustive" $(ARGS)

test-all:        ## Every test there is; what CI runs.
	@scripts/setup dev
	@scripts/need-mosquitto
	@.venv/bin/python -m pytest $(PARALLEL) $(ARGS)

lint:            ## Style, types and the import layers.
	@scripts/setup dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs:            ## The documentation as a site in build/site, with the Python reference.
	@test -x build/docs/bin/mkdocs || { $(PYTHON) -m venv build/docs && build/docs/bin/pip install -q -c constraints.txt '.[docs]'; }
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:           ## Forget the set-up; the models stay.
	rm -rf .venv
