# Every target sets itself up in .venv on a fresh machine. PYTHON chooses the interpreter (3.11 or later),
# NAME one benchmark, ARGS further arguments, JOBS the number of test processes.

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-peers format clean

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
NATIVE := $(wildcard CMakeLists.txt $(addprefix src/headrace/*/native/*,.cpp .h .txt .cmake))
BENCHMARKS := $(if $(NAME),benchmarks/$(NAME).py,$(sort $(wildcard benchmarks/[!_]*.py benchmarks/reproductions/[!_]*.py)))

PEERS := .peers
IBVERBS := libibverbs1 libnl-3-200 libnl-route-3-200

say = @printf '== %s\n'

help:
	@echo 'make demo     serve the bundled model and show what happens'
	@echo 'make test     all tests (ARGS="-k name" chooses)'
	@echo 'make check    format, lint, types, layers, tidy rules'
	@echo 'make bench    all benchmarks (NAME=name runs one)'
	@echo 'make bench-peers   other systems that benchmarks compare with, in .peers'
	@echo 'make format   rewrite the sources as check wants them'
	@echo 'make clean    remove everything that these commands made'

setup: $(READY)

$(READY): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'Headrace needs Python 3.11 or later: make PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || { echo '== setup: $(VENV)'; $(PYTHON) -m venv $(VENV); }
	$(say) 'setup: $(TORCH)'
	@$(PIP) '$(TORCH)'
	$(say) 'setup: headrace, its native kernels, and what tests and checks need'
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python -c 'import headrace.compute._native' 2>/dev/null || echo '== setup: no native kernels here (is there a C++ compiler?); plain torch takes their place, slower'
	@touch $@

demo: $(READY)
	@$(BIN)/headrace demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: $(READY)
	$(say) 'format'
	@$(BIN)/ruff format --quiet --check --output-format concise . || { echo 'make format mends this' >&2; exit 1; }
	$(say) 'lint'
	@$(BIN)/ruff check --quiet --output-format concise .
	$(say) 'types'
	@$(BIN)/pyright
	$(say) 'layers'
	@$(BIN)/lint-imports --no-logo
	$(say) 'tidy rules'
	@$(BIN)/python -m pytest -q tests/tidy

bench: $(READY)
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

bench-peers: $(PEERS)/.ready

$(PEERS)/.ready: benchmarks/peers/requirements.txt
	$(say) 'peers: $(PEERS)'
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -c 'import torch' 2>/dev/null || $(PEERS)/bin/python -m pip install -q -q --disable-pip-version-check '$(TORCH)'
	@$(PEERS)/bin/python -m pip install -q -q --disable-pip-version-check -r $<
	@ldconfig -p | grep -q libibverbs.so.1 || { mkdir -p $(PEERS)/system && cd $(PEERS)/system && apt-get -q -q download $(IBVERBS) 2>/dev/null \
		&& for file in *.deb; do dpkg -x $$file . || exit 1; done; } || echo '== peers: no libibverbs.so.1 here: Mooncake will be absent'
	@touch $@

format: $(READY)
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

clean:
	@rm -rf $(VENV) $(PEERS) build dist benchmarks/.cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	@find src tests benchmarks tools '(' -name __pycache__ -o -name '*.so' ')' -prune -exec rm -rf {} +
