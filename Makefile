# make quickstart   train on the synthetic set, print a table, leave runs/quickstart/
# make app          open the page in a browser; ARGS="--model some/folder" names another model than the quickstart's
# make test         all tests
# make test-fast    those that are not marked as slow, in three minutes at most on two cores
# make style        ruff: lint and format
# make lock         resolve all requirements*.txt anew into the .lock files
# make newest       all tests with the newest packages that the requirements allow; WITH=transformers==5.23.0 asks for one
# make oldest       all tests with the oldest packages that they allow
# make backbones    pretrain the small frozen backbones in backbones/ anew (28 minutes on two cores)
#
# The tests' targets hand ARGS to pytest, as in make test ARGS=tests/test_gallery.py, and
# make test-fast ARGS="--durations 30" lists the tests that take the longest.

PYTHON := .venv/bin/python
PYTHON_OF_THE_MACHINE := $$(command -v python3.11 || command -v python3)
# The tests tokenize with its vocabulary file. The packages that it depends on are not installed.
OPEN_CLIP := open-clip-torch==3.3.0
# No target needs a model or a data set from the Hub.
export HF_HUB_OFFLINE := 1
# Without these glibc returns the memory of each large tensor to the system, which slows training on CPUs down.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 8589934592

# While OpenMP's threads wait for each other, they count, by default for milliseconds. With this number training took
# 2 % longer on two idle cores, and 6 times as long instead of 33 times while something else used one of them.
export GOMP_SPINCOUNT := 20000
# Two processes with one thread each suit tests of small models better than one process with more threads.
# Whoever has run all of its tests takes some of the other's.
TESTS = OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

.PHONY: quickstart app test test-fast style lock newest oldest backbones

quickstart: .venv/installed
	$(PYTHON) quickstart.py

app: .venv/installed-app
	$(PYTHON) app.py $(if $(findstring --model,$(ARGS)),,--model runs/quickstart) $(ARGS)

test: .venv/installed-dev
	$(TESTS)

test-fast: .venv/installed-dev
	$(TESTS) -m "not slow"

style: .venv/installed-dev
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

backbones: .venv/installed
	$(PYTHON) -m backbones.pretrain --output_dir backbones

# The versions are those that suit all files together. The tests need what export_onnx.py needs, so it is in their lock.
# A CPU build of torch calls its version 2.13.0+cpu, which cannot be installed on other machines.
ALL_REQUIREMENTS = requirements.txt requirements-app.txt requirements-onnx.txt requirements-dev.txt
INTO_LOCK = .venv-lock/bin/python -m pip install --quiet
FREEZE = .venv-lock/bin/python -m pip freeze | sed 's/+cpu$$//'

lock:
	rm -rf .venv-lock
	$(PYTHON_OF_THE_MACHINE) -m venv .venv-lock
	$(INTO_LOCK) $(foreach part,$(ALL_REQUIREMENTS),--requirement $(part))
	$(FREEZE) > .venv-lock.txt
	rm -rf .venv-lock
	$(PYTHON_OF_THE_MACHINE) -m venv .venv-lock
	$(INTO_LOCK) --constraint .venv-lock.txt --requirement requirements.txt
	(echo "# Made by make lock from requirements.txt: what make quickstart installs." && $(FREEZE)) > requirements.lock
	$(INTO_LOCK) --constraint .venv-lock.txt --requirement requirements-app.txt
	(echo "# Made by make lock: what make app installs on top of requirements.lock." \
		&& $(FREEZE) | grep -vxFf requirements.lock) > requirements-app.lock
	$(INTO_LOCK) --constraint .venv-lock.txt --requirement requirements-onnx.txt --requirement requirements-dev.txt
	(echo "# Made by make lock: what make test installs on top of the two others." \
		&& $(FREEZE) | grep -vxFf requirements.lock -f requirements-app.lock) > requirements-dev.lock
	rm -rf .venv-lock .venv-lock.txt

newest: REQUIREMENTS = cat requirements.txt requirements-onnx.txt requirements-dev.txt
newest: .venv-newest/tests
oldest: REQUIREMENTS = sed 's/>=\([^,]*\),.*/==\1/' requirements.txt requirements-onnx.txt requirements-dev.txt
oldest: .venv-oldest/tests

.venv-%/tests: PYTHON = .venv-$*/bin/python
.venv-%/tests: FORCE
	rm -rf .venv-$*
	$(PYTHON_OF_THE_MACHINE) -m venv .venv-$*
	$(REQUIREMENTS) > .venv-$*/requirements.txt
	$(PYTHON) -m pip install --quiet --requirement .venv-$*/requirements.txt $(WITH)
	$(PYTHON) -m pip install --quiet --no-deps $(OPEN_CLIP)
	$(PYTHON) -m pip freeze
	$(TESTS)

FORCE:

# Stamp files: the environment is brought up to date when a lock is newer than they are.
# The quickstart is one process, for which Python compiles what it imports sooner than pip compiles all packages. The
# page and the tests, which start many processes, have everything compiled first.
.venv/installed: requirements.lock
	test -x $(PYTHON) || $(PYTHON_OF_THE_MACHINE) -m venv .venv
	$(PYTHON) -m pip install --quiet --no-compile --requirement requirements.lock
	touch $@

.venv/installed-app: requirements-app.lock .venv/installed
	$(PYTHON) -m pip install --quiet --no-compile --requirement requirements-app.lock
	$(PYTHON) -m compileall -qq -j 0 .venv/lib || true  # some packages hold templates that are no Python
	touch $@

.venv/installed-dev: requirements-dev.lock .venv/installed-app
	$(PYTHON) -m pip install --quiet --requirement requirements-dev.lock
	$(PYTHON) -m pip install --quiet --no-deps $(OPEN_CLIP)
	touch $@
