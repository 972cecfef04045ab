# make demo   set everything up, survey the bundled model, end with the path of its report
# make test   set everything up, run the tests
# make lint   ruff and mypy
# make docs   the pages as a site in docs/_build; a broken link is an error
# make figures  what the pages show of the demo: its figures, and the executed notebook (after make demo)
# make bench  the benchmarks, into benchmarks/results/ and docs/peers.md (two peers get environments of their own: .venv-autoround, .venv-modelopt)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
TORCH  ?= torch==2.13.0
PEERS  ?=
SHOWN  := criticality baselines size tasks plan

LLAMA  ?= @node-llama-cpp/linux-x64@3.22.1

.PHONY: demo test lint docs figures bench clean

demo: $(VENV)/.ready
	$(BIN)/bitatlas survey --out $(OUT) --resume

test: $(VENV)/.ready $(VENV)/.llama
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

figures: $(VENV)/.docs demo
	$(BIN)/bitatlas report $(OUT) --figures
	for name in $(SHOWN); do cp $(OUT)/figures/$$name.svg docs/images/demo-$$name.svg; done
	$(BIN)/python examples/execute.py $(OUT)

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/statements.py
	$(BIN)/python benchmarks/peers.py $(PEERS)

clean:
	rm -rf $(VENV) .venv-autoround .venv-modelopt .venv-runtimes $(OUT)

# torch comes first and by itself: the version pinned here decides which build everything else is resolved against.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# llama.cpp's own library, built: the tests of GGUF files run in it. Without npm they are skipped.
$(VENV)/.llama: $(VENV)/.ready
	rm -rf $(VENV)/llama.cpp && mkdir $(VENV)/llama.cpp
	if command -v npm >/dev/null && [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  cd $(VENV)/llama.cpp && npm pack --silent $(LLAMA) >/dev/null && tar xzf *.tgz && rm *.tgz; \
	else echo "no npm, or not Linux on x86-64: tests that run llama.cpp are skipped (BITATLAS_LLAMA_CPP names a library)"; fi
	touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@
