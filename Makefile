# `make help` lists the targets. Settings: make pretrain DATASET=kinetics700 PRESET=paper WORKERS=16
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
DATASET ?= demo
PRESET  ?= tiny
SHARDS  ?= shards
ESC10   ?= data/esc10
RUN     ?= runs/$(DATASET)-$(PRESET)
GPUS    ?= 1
BIN     := $(VENV)/bin
READY   := $(VENV)/.installed
AVTRAIN := $(if $(filter 1,$(GPUS)),$(BIN)/avtrain,$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) -m avtrain)

.DEFAULT_GOAL := help
.PHONY: help install check test test-slow lint docs pretrain demo bench bench-scale bench-gpu rehearse demo-report transfer-report \
        esc-report ablations audit clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

install: $(READY)  ## make .venv and install both packages into it

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check: lint  ## ruff, mypy, and the fast tests (under a minute on 2 cores)
	$(BIN)/python -m pytest -m fast --numprocesses 2 --dist loadfile --quiet

test: $(READY)  ## run the tests (5 minutes on 2 cores)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## run the tests that take minutes (an hour)
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)  ## build these docs into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

pretrain: $(READY)  ## prepare DATASET (demo), pretrain PRESET (tiny) on it with GPUS (1) processes; run again to go on
	$(BIN)/avprep build --dataset $(DATASET) --split all --out $(SHARDS) --workers $(WORKERS)
	$(AVTRAIN) pretrain --shards $(SHARDS)/$(DATASET) --preset $(PRESET) --out $(RUN)

demo: $(READY)  ## make the demo dataset, build its shards, draw a contact sheet
	$(BIN)/avprep build --dataset demo --split all --workers $(WORKERS)
	$(BIN)/avprep info shards/demo
	$(BIN)/avprep preview shards/demo/train -o shards/demo/preview.png

bench: $(READY)  ## run the benchmarks
	$(BIN)/python -m benchmarks

bench-scale: $(READY)  ## clips/s by executor and store, planning for 10^3 to 10^6 rows: tables and a plot (15 minutes)
	$(BIN)/python -m benchmarks.scale

rehearse: $(READY)  ## the paper's run at its own size, but for networks and pixels (15 minutes, 8 GB, 4 GB of disk)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.rehearsal

bench-gpu: $(READY)  ## measure the paper preset on this machine's GPU (docs/performance.md)
	$(BIN)/python -m benchmarks.gpu

demo-report: $(READY)  ## pretrain on the demo with three seeds (half an hour) and print what was learned
	$(BIN)/avprep build --dataset demo --split all --out $(SHARDS) --workers $(WORKERS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.demo_report --shards $(SHARDS)/demo

transfer-report: $(READY)  ## the demo by every protocol and modality, random start and pretrained: a table
	$(BIN)/avprep build --dataset demo --split all --out $(SHARDS) --workers $(WORKERS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.transfer_report --shards $(SHARDS)/demo

esc-report: $(READY)  ## ESC-10 from ESC10=FOLDER: pretrain on sound for each fold, transfer, print a table
	$(BIN)/avprep build --dataset demo --split all --out $(SHARDS) --workers $(WORKERS)
	$(BIN)/avprep build --dataset esc10 --split all --raw $(ESC10) --out $(SHARDS) --workers $(WORKERS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.esc_report --shards $(SHARDS)

ablations: $(READY)  ## pretrain on the demo over fusion, negatives, sharing: a table and a plot (half an hour)
	$(BIN)/avprep build --dataset demo --split all --out $(SHARDS) --workers $(WORKERS)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.ablations --shards $(SHARDS)/demo

audit: $(READY)  ## look for published faults in all installed packages, and none passed over (asks the public database)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $(VENV)/audited.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(VENV)/audited.txt || { \
	  echo "not clean: what is listed above has faults, or was not audited (no answer from the database, or unknown there)"; \
	  exit 1; }

clean:  ## remove .venv and caches (shards and data stay)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
