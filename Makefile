# make demo   set everything up, survey the bundled model, end with the path of its report
# make test   set everything up, run the tests
# make lint   ruff and mypy
# make bench  the benchmarks, into benchmarks/results/ and docs/peers.md (two peers get environments of their own: .venv-autoround, .venv-modelopt)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
TORCH  ?= torch==2.13.0
PEERS  ?=

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	$(BIN)/bitatlas survey --out $(OUT) --resume

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/peers.py $(PEERS)

clean:
	rm -rf $(VENV) .venv-autoround .venv-modelopt .venv-runtimes $(OUT)

# torch comes first and by itself: the version pinned here decides which build everything else is resolved against.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@
