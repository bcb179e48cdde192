# Everything a fresh machine needs: Python 3.10 or later and this file. The environment is made once and reused.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

# Tests start many processes, each of which would compile every package that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest lint format clean gpu execute mutants

# What the CUDA extension is built with comes first: setup.py builds it where it also finds nvcc, and says why where not.
# Python compiles what it imports, when it does: pip would compile everything, for most of its time.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt
# Its tests would be skipped, and nobody would see that it does not compile any more.
CPU_EXTENSION := $(if $(shell command -v g++),DITQ_BUILD_CPU=1)
# The extensions are compiled while all else is fetched.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools torch
	DITQ_BUILD_CUDA=0 DITQ_BUILD_CPU=0 $(INSTALL) --no-build-isolation --editable '.[test]' & installing=$$!; \
		$(CPU_EXTENSION) $(BIN)/python setup.py --quiet build_ext --inplace; built=$$?; wait $$installing && exit $$built
	touch $@

demo: $(READY)
	$(BIN)/ditq demo --out out/demo

test: $(READY) lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# What a user meets first, in the oldest versions that pyproject.toml allows (PyTorch's own build, with CUDA: gigabytes).
OLDEST := $(VENV)-oldest
SMOKE := $(addprefix tests/test_,quantizer.py packing.py linear.py adapters.py checkpoint.py calibration.py conversion.py \
	pipelines.py diffusers_quantizer.py transformers_quantizer.py diffusers_patches.py shared_input.py fusion_in_company.py)
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -q $(SMOKE)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	DITQ_BUILD_CUDA=0 $(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile \
		--constraint constraints-oldest.txt --editable '.[adapters]' pytest pytest-benchmark
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out

# Every kernel executed on this CPU from its compiled form, by the pinned Triton or by TRITON=3.6.0, which is fetched into
# a folder of its own. QUICK=1 takes the choice that takes minutes; ARCH="sm_90 sm_120", these architectures.
OTHER := $(if $(TRITON),$(CURDIR)/$(VENV)/triton-$(TRITON))
execute: $(READY) $(OTHER)
	$(if $(OTHER),PYTHONPATH=$(OTHER)) $(BIN)/ditq inspect --execute $(if $(QUICK),--quick) $(if $(ARCH),--arch $(ARCH))

$(CURDIR)/$(VENV)/triton-%: | $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --target $@.part --no-deps triton==$*
	mv $@.part $@

# How many faults the tests let through: changes to the source, drawn and planted, each with the tests of its part. For
# hours; what was tested is written down, and not tested again. MUTANTS="--stratum ops --count 10" takes some.
mutants: $(READY)
	DITQ_BUILD_CUDA=0 DITQ_BUILD_CPU=0 $(INSTALL) --no-build-isolation --editable '.[mutants]'
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS)

# Everything that a machine with a GPU can say, without the environment above where there is no network to make it from.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py
