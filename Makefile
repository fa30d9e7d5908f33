# `make audit` shows the tool at work; `make test` checks it. Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SPECS := $(wildcard sample_specs/digits_*.yaml)

.PHONY: audit test samples clean

audit: $(VENV)/installed
	$(BIN)/ggl-audit run sample_specs/digits_sparsified.yaml --exit-zero -o report.html -o report.json

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# Makes every file below sample_specs/ that is not a spec or code, bit for bit.
samples: $(VENV)/installed
	$(BIN)/python sample_specs/make_samples.py
	for spec in $(SPECS); do \
		$(BIN)/ggl-audit capture $$spec --image sample_specs/captures/private.png --label 2 || exit; \
	done

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
