# make demo   a trained network's view of real images, as figures and a page (out/demo/index.html)
# make test   the tests
# make bench  the benchmarks, with their floors
# make attack hostile calls of every op, 20,000 each, whose counts go to out/attack.md; then files, forks and races at length
#
# Each makes the virtual environment .venv and installs everything into it first. Variables:
#   PYTHON=python3.12         the interpreter (3.10 to 3.13)
#   TORCH=torch==2.13.0       what to install as torch; a range or another build works too
#   ZFCORE_CUDA=AUTO|ON|OFF   whether the CUDA kernels are built
#   ZFCORE_ATTACK=20000       how many calls of each op "make attack" makes

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
OUT ?= out/demo

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find zfcore kernels csrc -type f \
	! -name '*.pyc' ! -name '*.so' 2>/dev/null)

.PHONY: demo test bench attack env clean

demo: $(VENV)/installed
	$(BIN)/zfcore demo --out $(OUT)

test: $(VENV)/installed $(VENV)/testing
	$(BIN)/pytest tests

bench: $(VENV)/installed $(VENV)/testing
	$(BIN)/pytest bench --benchmark-only

attack: $(VENV)/installed $(VENV)/testing
	@mkdir -p out
	$(BIN)/python tests/attack/attack_run.py --table out/attack.md
	ZFCORE_ATTACK=1 ZFCORE_RACE_SECONDS=100 $(BIN)/pytest tests/kinds/test_forks.py tests/data/test_picture_bounds.py \
		tests/models/test_weights_fuzz.py tests/ops/test_switches_that_change.py tests/native/test_race_switches.py

env: $(VENV)/installed
	cd $(VENV) && bin/python -m zfcore.env

$(VENV)/bin/pip:
	PYTHON="$(PYTHON)" sh .ci/venv "$(VENV)"

# torch first and pinned: whatever depends on it then leaves it as it is.
$(VENV)/torch: $(VENV)/bin/pip
	$(BIN)/pip install --quiet "$(TORCH)"
	@if [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ]; then $(BIN)/pip install --quiet "$(TRITON)"; fi
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet .
	@cd $(VENV) && bin/python -m zfcore.env  # not from here, where the source tree would hide the install
	@touch $@

# The test tools come from the package's own list of extras, so that they stand in one place.
$(VENV)/testing: $(VENV)/torch pyproject.toml
	$(BIN)/python .ci/extras.py test | xargs $(BIN)/pip install --quiet
	@touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
