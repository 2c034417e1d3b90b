# From a fresh checkout with Python 3.10 or newer: `make demo`. Python and all packages go into .venv, nothing elsewhere.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# An editable install points to the checkout's own path, so a checkout that moved has to install again.
HERE := $(shell pwd | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(HERE)
INSTALLED_DEV := $(VENV)/installed-dev-$(HERE)
DESCRIPTION := pyproject.toml setup.py Makefile $(wildcard csrc/*.py csrc/*/*)

.PHONY: help venv demo test lint sanitize fuzz bench gallery clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON=python3.12 chooses the Python that .venv is made from, ARGS='-k pool' adds arguments to test and bench."

venv: $(INSTALLED_DEV)  ## make .venv with everything that tests and checks need

demo: $(INSTALLED)  ## invert the built-in network and write a report, in minutes on a CPU; goes on where it stopped
	$(BIN)/smi invert --preset demo --out demo-pool
	$(BIN)/smi report demo-pool

# One thread for each process, and no more processes than memory allows: the shapes of tests are small.
test: $(INSTALLED_DEV)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(INSTALLED_DEV)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: $(INSTALLED_DEV)  ## run the tests of the compiled operators under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python csrc/build.py --sanitize --out build/sanitized/libraries
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    SMI_NATIVE=cpu SMI_NATIVE_LIBRARIES=build/sanitized/libraries \
	    $(BIN)/python -m pytest -k "(cpu or native) and not wheel" $(ARGS) $(wildcard tests/test_*_kernels.py) tests/test_native.py

fuzz: $(INSTALLED_DEV)  ## give damaged files of every kind to what reads them, by atheris, ARGS="-max_total_time=60" each
	$(BIN)/python -m pip install --quiet atheris
	for target in $$($(BIN)/python tests/fuzz.py --list); do \
	    $(BIN)/python tests/fuzz.py $$target $(or $(ARGS),-max_total_time=60) || exit 1; \
	done

bench: $(INSTALLED)  ## time sparse against dense inversion; ARGS='--model ...' chooses what, ARGS=--help lists
	$(BIN)/python -m benchmarks.sparse_vs_dense $(ARGS)

gallery: $(INSTALLED)  ## draw docs/gallery.png, what each method makes of the built-in network, and its page
	$(BIN)/python -m benchmarks.gallery

clean:  ## remove what make and the tools made: .venv, demo-pool, builds, caches
	rm -rf $(VENV) demo-pool build dist smi_kernels/_native *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): $(DESCRIPTION)
	$(call install,.,$@)

$(INSTALLED_DEV): $(DESCRIPTION)
	$(call install,.[test$(comma)lint],$@ $(INSTALLED))

comma := ,

# $(1) what to install, editable, so that changed code is used at once; $(2) the stamps to leave behind.
# `installing` lies in .venv while pip works. Found at the start, pip was killed half-way and may have left packages
# that look whole: only a new .venv is safe. After an ordinary failure pip has put everything back.
define install
@if [ -e $(VENV)/installing ] || ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || { \
        echo "$(PYTHON) is not Python 3.10 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }; \
    $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
        echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
    echo "Making $(VENV) from $$($(PYTHON) --version)."; \
    { [ ! -e $(VENV)/installing ] && $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version; } > /dev/null 2>&1 \
        || $(PYTHON) -m venv --clear $(VENV) || exit 1; \
fi
@echo "Installing into $(VENV): the first time a few minutes, and about 6 GB where torch comes with CUDA."
@rm -f $(VENV)/installed-*
@touch $(VENV)/installing
@{ \
    $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off --editable '$(1)'; \
    status=$$?; \
    [ $$status -gt 128 ] || rm -f $(VENV)/installing; \
    [ $$status -ne 0 ] || touch $(2); \
} | while read -r word rest; do \
    case "$$word $$rest" in \
        *.metadata*) ;; \
        Downloading* | "Using cached"* | Processing*.whl) echo "  $$word $$rest" ;; \
        "Installing collected"*) echo "  Installing" ;; \
    esac; \
done
@[ -e $@ ] || { echo "The installation failed; mend what pip says above and run make again." >&2; exit 1; }
endef
