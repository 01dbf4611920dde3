# Everything runs from a fresh clone with python3 (3.11 or newer) and make; .venv is made as needed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=

.PHONY: help run demo lint test bench soak year gate chaos standby check page bundle pins packages clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

run: $(VENV)/run.stamp  ## serve with config.yaml
	$(PY) -m loadmanager -config config.yaml

demo: $(VENV)/run.stamp  ## a real 20 s load test, end to end
	$(PY) tests/demo.py

lint: $(VENV)/test.stamp  ## rules, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint packages  ## lint, and all tests
	$(PY) -m pytest tests -n 4 --dist loadscope $(PYTEST_ARGS)

bench: $(VENV)/test.stamp packages  ## figures, beside those to reach: make bench ONLY=page,reads
	$(PY) tests/bench.py $(if $(ONLY),--only $(ONLY))

soak: $(VENV)/test.stamp  ## 50 runs at once for long: is anything not flat? make soak MINUTES=120
	$(PY) tests/soak.py --minutes $(or $(MINUTES),3)

year: $(VENV)/test.stamp  ## what a year of hourly runs takes on disk: make year RUNS=8760
	$(PY) tests/year.py --runs $(or $(RUNS),8760)

gate: $(VENV)/test.stamp  ## the comparison on real Locust: false alarms, and slower runs found: make gate PAIRS=40
	$(PY) tests/gate_campaign.py --pairs $(or $(PAIRS),40) $(if $(SEED),--seed $(SEED))

chaos: $(VENV)/test.stamp  ## episodes of faults and kills, then the invariants: make chaos MINUTES=10 SEED=1
	$(PY) tests/chaos.py --minutes $(or $(MINUTES),2) $(if $(SEED),--seed $(SEED))

standby: $(VENV)/test.stamp packages  ## kills and cuts of the one that leads, during real runs: make standby KILLS=50 SEED=1
	$(PY) tests/standby_campaign.py --kills $(or $(KILLS),5) $(if $(SEED),--seed $(SEED))

check: $(VENV)/run.stamp  ## the module compiles, the shipped configuration is good
	$(PY) -m compileall -q loadmanager.py locust tests
	$(PY) loadmanager.py check -config config.yaml

# To work on the page: `make page` takes its parts out into page/, where LOADMANAGER_PAGE_DIR=page serves
# them from; once page/ is there, it puts them back into loadmanager.py.
page: $(VENV)/test.stamp  ## the page's CSS and JavaScript as files in page/, and back
	@if [ -d page ]; then $(PY) tests/page.py in page && echo "page/ is in loadmanager.py; remove page/ when done"; \
	else $(PY) tests/page.py out page && echo "work in page/, and serve it: LOADMANAGER_PAGE_DIR=page make run"; fi

bundle: $(VENV)/bin/python  ## one archive for a host without a network: make bundle PYTHON_VERSION=3.12
	$(PY) deploy/bundle.py --out dist $(if $(PYTHON_VERSION),--python-version $(PYTHON_VERSION))

pins:  ## renew the pinned versions and hashes
	PYTHON=$(PYTHON) deploy/pins.sh

# What the tests and figures take from Debian: a database, a browser, a load generator, a shell.
packages:
	@tests/packages.sh

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: deploy/run.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r deploy/run.txt
	@touch $@

$(VENV)/test.stamp: tests/requirements.txt $(VENV)/run.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) .demo dist tests/output loadmanager-logs
