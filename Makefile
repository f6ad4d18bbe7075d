# `make demo` and `make test` do their own set-up; Python 3.11 with venv, make and git are all they need.

PYTHON ?= python3
OUT ?= out
REAL ?= ../shared/real
PYTEST_FLAGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv .venv-dev demo demo-real test clean

help:  ## Show this list
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

.venv: .venv/install_seconds  ## Install the library's environment from requirements.txt

.venv-dev: .venv-dev/install_seconds  ## Install the test environment from requirements-dev.txt

# An environment's stamp is written last and holds the seconds the installation took: an installation that broke off is
# started again, and so is one whose lock has changed. --use-pep517 builds source packages alike with every pip.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing $(@D) from $< ..."
	@start=$$(date +%s) && $(PYTHON) -m venv --clear $(@D) && \
	  $(@D)/bin/pip install --quiet --disable-pip-version-check --use-pep517 -r $< && \
	  echo $$(( $$(date +%s) - start )) > $@ && echo "Installed $(@D) in $$(cat $@) s."
endef

.venv/install_seconds: requirements.txt
	$(install)

.venv-dev/install_seconds: requirements-dev.txt
	$(install)

demo: .venv  ## Train, generate, score and export on the embedded phantom corpus: out/demo/
	.venv/bin/python -m launch.demo --config=configs/phantom.py --out=$(OUT)/demo \
	  --install_seconds=$$(cat .venv/install_seconds)
	@echo "Not in these times: installing .venv took $$(cat .venv/install_seconds) s."

demo-real: .venv  ## The same from a folder of images and reports, REAL=DIR: out/demo-real/
	.venv/bin/python -m launch.demo --config=configs/phantom.py --dataset=folder --source=$(REAL) --out=$(OUT)/demo-real --steps=20 \
	  --install_seconds=$$(cat .venv/install_seconds)
	@echo "Not in these times: installing .venv took $$(cat .venv/install_seconds) s."

ifeq ($(SLOW),1)
test: .venv-dev  ## Lint, type-check and test; with SLOW=1 the long tests alone
	.venv-dev/bin/python -m pytest -m slow -n 2 --dist loadscope $(PYTEST_FLAGS)
else
test: .venv-dev
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/ruff check .
	.venv-dev/bin/mypy
	.venv-dev/bin/python -m pytest -m "not slow" -n 2 $(PYTEST_FLAGS)
endif

clean:  ## Remove environments, caches and outputs
	rm -rf .venv .venv-dev $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
