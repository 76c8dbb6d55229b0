# make quickstart   train on the synthetic set, print a table, leave runs/quickstart/
# make test         all tests
# make style        ruff: lint and format
# make backbones    pretrain the small frozen backbones in backbones/ anew (28 minutes on two cores)

PYTHON := .venv/bin/python
# Its vocabulary file is what the tests tokenize with.
OPEN_CLIP := open-clip-torch==3.3.0
# Nothing here needs a model or a data set from the Hub.
export HF_HUB_OFFLINE := 1
# glibc otherwise returns the memory of each large tensor to the system, which makes training on CPUs slower.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: quickstart test style backbones

quickstart: .venv/installed
	$(PYTHON) quickstart.py

test: .venv/installed-dev
	$(PYTHON) -m pytest

style: .venv/installed-dev
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

backbones: .venv/installed
	$(PYTHON) -m backbones.pretrain --output_dir backbones

# Stamps: the environment is made, and made up to date, when a list of requirements is newer.
.venv/installed: requirements.txt
	test -x $(PYTHON) || $$(command -v python3.11 || command -v python3) -m venv .venv
	$(PYTHON) -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PYTHON) -m pip install --quiet --requirement requirements-dev.txt
	$(PYTHON) -m pip install --quiet --no-deps $(OPEN_CLIP)
	touch $@
