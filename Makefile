# `make audit` shows the tool at work; `make test` checks it. Both make the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NUMBERS := $(addprefix tests/,attack defenses evidence optimizers priors)
SPECS := $(wildcard sample_specs/digits_*.yaml)

.PHONY: audit test test-processors docs samples pneumonia clean

audit: $(VENV)/installed
	$(BIN)/ggl-audit run sample_specs/digits_sparsified.yaml --exit-zero -o report.html -o report.json

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# The tests of numbers as other processors compute them: without vector instructions, with those of
# ten years ago, with sums over two threads. A bound that fails in one of them held here by luck.
test-processors: $(VENV)/installed
	for processor in \
		"ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott" \
		"ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell" \
		"OMP_NUM_THREADS=2"; \
	do \
		echo "$$processor" && env $$processor $(BIN)/pytest $(NUMBERS) || failed=yes; \
	done; test -z "$$failed"

# Makes the pages that follow from the program's own tables again.
docs: $(VENV)/installed
	$(BIN)/python docs/make.py

# Makes the weights and captures of the digits below sample_specs/ again, bit for bit.
samples: $(VENV)/installed
	$(BIN)/python sample_specs/make_samples.py
	for spec in $(SPECS); do \
		$(BIN)/ggl-audit capture $$spec --image sample_specs/captures/private.png --label 2 || exit; \
	done

# The same for the radiographs, given the data: make pneumonia NPZ=PATH/pneumoniamnist.npz
pneumonia: $(VENV)/installed
	$(BIN)/python sample_specs/make_pneumonia.py $(NPZ)
	$(BIN)/ggl-audit capture sample_specs/pneumonia.yaml --label 0 \
		--image sample_specs/captures/radiograph.png \
		--set 'evidence.reference={npz: $(abspath $(NPZ)), split: test}'

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
