# Everything for people and for CI. Each target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-postgres test-all check browser docs fuzz audit bench openapi wheels lock clean

setup: .venv/ready

.venv/ready: pyproject.toml client/pyproject.toml requirements.lock requirements-dev.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e client -e .
	touch .venv/ready

demo: setup            ## the whole line on the embedded model and data
	$(BIN)/python demo/demo.py

check: setup           ## lint, format, strict types, contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	git ls-files -z | grep -zvE '\.(gz|npz|png|svg|lock|safetensors)$$|^demo/|^openapi.yaml' | xargs -0 $(BIN)/detect-secrets-hook
	$(BIN)/python -m service.openapi | diff - openapi.yaml
	$(BIN)/python -m narrow_engine.report.schema | diff - docs/report.schema.json
	$(BIN)/python -m service.settings | diff - docs/reference/settings.md
	$(BIN)/python docs/generate.py --check

test: check browser    ## the fast tests
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-postgres: setup   ## what needs a database, on Postgres instead of SQLite
	NARROW_TEST_DATABASE=postgres $(BIN)/python -m pytest -n 2 --dist worksteal tests/contract tests/integration tests/e2e \
	    --ignore tests/integration/test_engine.py --ignore tests/integration/test_experiments.py

test-all: check browser ## all tests, with the extras that they need
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e client -e '.[eval,ray]'
	$(BIN)/python -m pytest
	$(MAKE) test-postgres docs

browser: setup         ## a Chromium for the tests of the pages, if there is none; without one they are skipped
	@if which chromium || which chromium-browser || which google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && which apt-get > /dev/null; then \
	    timeout 300 sh -c "apt-get update -qq && apt-get install -y -qq chromium > /dev/null"; \
	else $(BIN)/playwright install chromium; fi || echo "There is no Chromium: the tests of the pages are skipped."

docs: setup            ## the site, in docs/_build/html; what docs/reference says is made anew
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build -W -n --keep-going -q -c docs . docs/_build/html

fuzz: setup            ## ten minutes of each parser
	for parser in $$($(BIN)/python tests/fuzz.py --list); do \
	    (cd $$(mktemp -d) && $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz.py $$parser -max_total_time=600) || exit 1; done

audit: setup           ## known faults of the dependencies, by PyPI's advisories
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --requirement requirements.lock --no-deps --disable-pip

bench: setup           ## the figures of the README; more than an hour
	$(BIN)/python bench/training.py
	$(BIN)/python bench/quality.py

openapi: setup         ## export the contract and the report's schema, regenerate the client's models
	$(BIN)/python -m service.openapi > openapi.yaml
	$(BIN)/python -m narrow_engine.report.schema > docs/report.schema.json
	$(BIN)/python -m service.settings > docs/reference/settings.md
	$(BIN)/python client/generate.py
	$(BIN)/python docs/generate.py

wheels: setup          ## both distributions, into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist ./client .

lock: setup            ## write down the versions that are installed
	$(BIN)/python deploy/lock.py

clean:
	rm -rf .venv demo/out bench/out experiments/out build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
