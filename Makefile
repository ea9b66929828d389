# `make demo` shows it working, `make test` checks all that CI checks. Both set themselves up; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
SETUP := pyproject.toml setup.py constraints.txt $(wildcard cython_extensions/*.pyx)
PIP := $(BIN)/python -m pip install -q --progress-bar off --disable-pip-version-check -c constraints.txt
# one thread for each of the JOBS processes: more of them only wait for each other
RUN := PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1

.PHONY: demo test processors export docs clean help
.NOTPARALLEL:

help:  ## this list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' Makefile | expand -t 18

demo: $(BIN)/.base  ## install the package, then the whole job on made data in about two minutes
	@$(BIN)/anomdx demo

test: $(BIN)/.dev  ## all that CI checks: notebooks clean and exported, their tests, the docs site, pytest
	@echo "== notebooks are clean and exported, README.md is written from index.ipynb"
	@$(MAKE) -s export
	@if [ -e .git ]; then \
	  git --no-pager diff --exit-code -- nbs anomdx README.md && \
	  ! git status --porcelain --untracked-files=all -- nbs anomdx README.md | grep '^??' || \
	  { echo "The files above are not as the notebooks make them: run make export, then git add."; exit 1; }; \
	else echo "Not a git checkout, so there is no commit to compare the export with: skipped."; fi
	@echo "== the notebooks' own tests"
	@$(RUN) nbdev_test --n_workers $(JOBS) --timing
	@echo "== docs site"
	@if $(BIN)/python -c "import smalldocs" 2>/dev/null; then $(RUN) python tools/docs.py; \
	else echo "smalldocs needs Python 3.11 or later: the site is not built here."; fi
	@echo "== pytest (its tests/test_notebooks.py is what nbdev_test just did)"
	@$(RUN) pytest -q --ignore tests/test_notebooks.py -n $(JOBS) --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=85 --durations=5

processors: $(BIN)/.dev  ## the tests on the arithmetic of other processors, about an hour; one row: make processors ROWS=old
	@PYTHON="$(abspath $(BIN))/python" JOBS=$(JOBS) tools/processors.sh $(ROWS)

export: $(BIN)/.dev  ## clean the notebooks, export them to anomdx/, write README.md
	@$(RUN) nbdev_clean
	@$(RUN) nbdev_export
	@$(RUN) python tools/readme.py

docs: $(BIN)/.dev  ## build the site into _docs/ and check its links
	@$(RUN) python tools/docs.py

clean:  ## remove what was built; notebooks, runs and data stay
	rm -rf $(VENV) .venv-nbdev3 _docs _proc build dist *.egg-info .pytest_cache .coverage .coverage.* anomdx/*.so

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(BIN)/.base: $(SETUP) | $(BIN)/pip
	$(PIP) -e .
	@touch $@

$(BIN)/.dev: $(SETUP) | $(BIN)/pip
	$(PIP) -e '.[dev]'
	@touch $@ $(BIN)/.base
