# `make` lists the commands. The first use of any of them creates .venv and installs what
# it needs; a second use installs nothing. On the command line, for example
#     make test PYTHON=python3.12         another Python
#     make test ARGS="-k rope -x"         arguments for the program behind the command
#     make book TORCH=plain               torch as the package index has it, or TORCH=cpu
PYTHON ?=
ARGS ?=
UPGRADE ?=
TORCH ?= auto
# Where the small build of torch is kept. Nothing breaks if it cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
STAMPS := $(VENV)/.stamps
LOG := $(VENV)/.pip.log
PIP := $(RUN) pip --disable-pip-version-check install --log $(LOG)
HTML := book/_build/html
# The matrices here are small: more threads in one multiplication mostly wait for each
# other (on two busy cores five times as long), and may change a number's last digit.
THREADS ?= 1
PYTEST := OMP_NUM_THREADS=$(THREADS) $(RUN) pytest
JOBS ?= logical

# $(call where,<files>,<groups>): these groups of packages, where there is such a file.
# $(call if_any,<files>,<command>,<what to say where there is no such file>)
where = $(if $(1),$(addprefix $(STAMPS)/,$(2)))
if_any = $(if $(1),$(2),echo "$(3)")
CUDA := $(wildcard tests/cuda/test_*.py)
EXERCISES := $(wildcard exercises/*.ipynb)
BENCHMARKS := $(wildcard tests/benchmarks/test_*.py)

.NOTPARALLEL:
.SUFFIXES:
.PHONY: help book open test test-cuda grade lab bench bench-gpu check-book lint clean setup lock
.PHONY: stale

help: ## List these commands
	@echo "minidsv3, DeepSeek-V3 from scratch. The commands:"; echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile \
	  | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo; echo "The first use sets up .venv and downloads packages; later uses do not."

# One thread: the pages' matrices are small, and two threads that share a core with
# something else spend their time waiting for each other (four times slower, measured).
book: $(STAMPS)/book ## Build the book, running its code
	@echo "-- Building the book: minutes where its code has to run, else seconds."
	@MINIDSV3_TERMINAL=$$(tty || true); export MINIDSV3_TERMINAL; \
	[ -w "$$MINIDSV3_TERMINAL" ] || MINIDSV3_TERMINAL=; \
	OMP_NUM_THREADS=$(THREADS) $(BIN)/jupyter-book build book -W -n --keep-going $(ARGS)
	@echo "-- The book: $(CURDIR)/$(HTML)/index.html (make open)"

open: $(STAMPS)/book ## Open the book in the browser
	@[ -f $(HTML)/index.html ] || $(MAKE) --no-print-directory book
	@echo "-- Opening file://$(CURDIR)/$(HTML)/index.html"
	@$(RUN) webbrowser "file://$(CURDIR)/$(HTML)/index.html"

test: lint ## Run every test that needs no GPU
	@$(PYTEST) -n $(JOBS) --maxprocesses 4 $(ARGS)

test-cuda: $(call where,$(CUDA),test cuda) ## Compile the CUDA kernels and check them
	@$(call if_any,$(CUDA),$(PYTEST) tests/cuda -n $(JOBS) --maxprocesses 4 $(ARGS),There are no CUDA tests yet.)

grade: $(call where,$(EXERCISES),lab) ## Grade your answers to the exercises
	@$(call if_any,$(EXERCISES),$(PYTEST) exercises $(ARGS),There are no exercises yet.)

lab: $(call where,$(EXERCISES),lab) ## Open the exercises in JupyterLab
	@$(call if_any,$(EXERCISES),$(RUN) jupyterlab exercises $(ARGS),There are \
	  no exercises yet.)

bench: $(call where,$(BENCHMARKS),test) ## Measure how long things take
	@$(call if_any,$(BENCHMARKS),$(RUN) pytest tests/benchmarks -s $(ARGS),There is \
	  nothing to measure yet.)

bench-gpu: $(STAMPS)/cuda ## Time the CUDA kernels on an NVIDIA card
	@$(BIN)/python book/kernel_speed.py $(ARGS)

check-book: $(STAMPS)/test ## Look at every page of the book in headless Chromium
	@[ -f $(HTML)/index.html ] || $(MAKE) --no-print-directory book
	@$(BIN)/python book/_check/browser.py $(HTML) $(ARGS)

lint: $(STAMPS)/test ## Check the style of the code
	@$(RUN) ruff check
	@$(RUN) ruff format --check

clean: ## Remove what was built (not .venv, your answers or runs)
	@rm -rf book/_build .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name $(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
	@echo "Removed the built book and all caches. The set-up stays: rm -rf $(VENV)"

setup: $(STAMPS)/test ## Only set up, so that the other commands start at once
	@echo "-- The set-up is complete."

lock: $(STAMPS)/venv ## Write constraints.txt anew (for maintainers)
	@$(call install,--quiet uv)
	@grep '^#' constraints.txt > constraints.new
	@cp constraints.txt $(VENV)/pins.txt
	@$(RUN) uv pip compile pyproject.toml --all-extras --universal --quiet \
	  --python-version 3.11 --no-header --no-annotate \
	  $(UPGRADE:%=--upgrade-package %) --output-file $(VENV)/pins.txt
	@grep -vE '^(nvidia-|cuda-|triton|#)' $(VENV)/pins.txt >> constraints.new
	@mv constraints.new constraints.txt

# ------------------------------------------------------------------- the set-up
# .venv is begun anew if it was moved, if its Python is gone, if its creation was cut off,
# or if pip was cut off while it put files in place: then its log lies there and says so.
usable = [ -x $(BIN)/python ] && [ ! -e $(VENV)/.unfinished ] \
  && { [ ! -e $(STAMPS)/venv ] || [ "$$(cat $(STAMPS)/venv)" = "$(CURDIR)" ]; } \
  && ! grep -qs '^[^ ]* Installing collected packages' $(LOG)
STALE := $(shell $(usable) || echo stale)

# Prints the version of $$python; fails if it is too old or cannot make a .venv.
try_python = "$$python" -c 'import sys, venv, ensurepip; \
  print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))' 2> /dev/null

$(STAMPS)/venv: $(STALE)
	@found=; version=; \
	if $(usable) && python=$(BIN)/python && version=$$($(try_python)) \
	  && $(RUN) pip --version > /dev/null 2>&1; then \
	  echo "-- Using the $(VENV) that is here already (Python $$version)."; \
	else \
	  for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	    version=$$($(try_python)) && break; \
	    found="$$found $$python ($${version:-missing, or without its module venv}),"; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then printf '%s\n' "" \
	    "No Python was found that can run minidsv3." \
	    "  Found: $${found%,}." \
	    "  Needed: Python 3.11 or newer, with its module venv." \
	    "  To do:  install one (Debian, Ubuntu: apt install python3 python3-venv;" \
	    "          macOS: brew install python; or python.org), or name yours:" \
	    "          make PYTHON=/path/to/python3.12 ..." >&2; \
	    exit 1; \
	  fi; \
	  [ ! -e $(VENV) ] || echo "-- $(VENV) is incomplete or was moved: it is made anew."; \
	  echo "-- Creating $(VENV) with Python $$version: a few seconds."; \
	  rm -rf $(VENV) && mkdir -p $(VENV) && touch $(VENV)/.unfinished \
	  && "$$python" -m venv $(VENV) && rm $(VENV)/.unfinished; \
	fi
	@rm -f $(LOG); mkdir -p $(STAMPS) && printf %s "$(CURDIR)" > $@

# $(call install,<arguments for pip>): or a word on why it failed, and what to do.
install = rm -f $(LOG); $(PIP) $(1) && rm -f $(LOG) || { printf '%s\n' "" \
  "The set-up is not complete: pip could not install the packages above." >&2; \
  if grep -qsE '$(unreachable)' $(LOG); then printf '%s\n' \
  "  Found:  no answer from the package index, or not the package it was asked for." \
  "  Needed: a network that reaches it, once; later uses need none." \
  "  To do:  go online (behind a proxy: set HTTPS_PROXY), then give the same command" \
  "          again. What was downloaded is kept." >&2; \
  else echo "  To do:  read pip's message, then give the same command again." >&2; fi; \
  exit 1; }
unreachable = connection broken|Connection(Error|Refused)|ProxyError|SSLError|timed \
  out|No matching distribution

# torch comes first and alone: as the package index has it for Linux, it brings two to
# three gigabytes of libraries for NVIDIA cards, which a reader without one does not need.
driver = command -v nvidia-smi || [ -e /proc/driver/nvidia/version ] \
  || ldconfig -p 2> /dev/null | grep libcuda.so.1
wants_cpu = [ "$(TORCH)" = cpu ] || { [ "$(TORCH)" = auto ] && [ "$$(uname)" = Linux ] \
  && ! { $(driver); } > /dev/null 2>&1; }

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@trap 'exit 130' INT; \
	if $(wants_cpu); then \
	  echo "-- Installing torch for the CPU: about 200 MB."; \
	  if $(PIP) --no-deps --retries 1 --timeout 15 --index-url $(TORCH_INDEX) \
	    --constraint constraints.txt torch; then rm -f $(LOG); touch $@; exit 0; fi; \
	  echo "-- The CPU build of torch could not be had. The plain package follows, which"; \
	  echo "   brings libraries for NVIDIA cards: about 3 GB. Ctrl-C stops it."; \
	else \
	  echo "-- Installing torch: up to 3 GB where there is an NVIDIA card."; \
	fi; \
	$(call install,--constraint constraints.txt torch)
	@touch $@

$(patsubst %,$(STAMPS)/%,book test lab cuda): $(STAMPS)/%: $(STAMPS)/torch \
  pyproject.toml constraints.txt
	@echo "-- Installing minidsv3 and what 'make $(patsubst cuda,test-cuda,$*)' needs:" \
	  "a minute or two."
	@$(call install,--constraint constraints.txt --editable ".[$*]")
	@touch $@
