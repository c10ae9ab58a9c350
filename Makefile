# One-word commands; `make help` lists them. Everything is installed into .venv, nothing else is touched.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
DEMO ?= demo
PINS ?= constraints.txt
# One more than there are cores, for some tests wait for other processes; who is done takes over what others have left.
PARALLEL := -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --dist worksteal

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# torch comes first and by itself, so that nothing else chooses its build. The rest is pinned: what a library deprecates
# shows when the pins are renewed, not in a change that has nothing to do with it. timm comes without torchvision, whose
# wheels do not load beside every build of torch; the tests need only its networks. All cores compile what is installed,
# where pip would use one; files for other versions of Python, which some packages carry, do not compile.
.venv/installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable ".[all]" --group dev --constraint $(PINS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps timm --constraint $(PINS)
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	@touch $@

.PHONY: setup
setup: .venv/installed ## make .venv with pliant and all that development needs

.PHONY: demo
demo: setup ## train three networks on small images, compress them, write demo/report.html
	rm -rf "$(DEMO)"
	$(BIN)/pliant demo --out "$(DEMO)"

.PHONY: test
test: setup ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

.PHONY: coverage
coverage: setup ## run all tests and tell which lines of src none of them runs, programs that tests start included
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) --cov --cov-report=term

.PHONY: lowest
lowest: ## run all tests with the oldest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check uv "$(TORCH)"
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --compile-bytecode \
		--editable ".[all]" --group test
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest $(PARALLEL)

.PHONY: upgrade
upgrade: ## make .venv anew with the newest versions and write them to constraints.txt
	rm -rf .venv
	$(MAKE) setup PINS=/dev/null
	$(BIN)/pip freeze --exclude-editable --exclude torch > constraints.txt
	@touch .venv/installed

.PHONY: soak
soak: setup ## kill commands at fifty moments and read many more damaged files than the tests do; minutes
	OMP_NUM_THREADS=1 PLIANT_KILLS=50 PLIANT_FUZZ=10 $(BIN)/pytest tests/faults tests/fuzz

.PHONY: bench
bench: setup ## measure what a step costs, what compression gains; many minutes, on an idle machine
	$(BIN)/python benchmarks/step.py --out benchmarks/results
	$(BIN)/python benchmarks/latency.py --out benchmarks/results
	$(BIN)/python benchmarks/models.py --out docs/models.md

.PHONY: docs
docs: setup ## build the documentation: build/docs/index.html
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo build/docs/index.html

.PHONY: pictures
pictures: setup ## draw the pictures of the documentation and the table of the README
	$(BIN)/python docs/pictures/balls.py
	$(BIN)/python docs/pictures/comparison.py

.PHONY: check
check: setup ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove .venv, caches and the demo
	rm -rf .venv .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis "$(DEMO)" build dist
