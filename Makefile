# `make help` lists the targets. Set-up is a dependency of everything, so a fresh clone needs no other step.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The pinned versions need Python 3.11; on 3.10 pip chooses.
PINS   := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check $(PINS)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast test-slurm test-extras test-sweeps setup-sweeps test-newest test-gpu lint types format docs wheel dist nusax xnli-tydiqa toy-table toy-tasks mt-gain evidence reliability report clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install flare_exp with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "flare_exp needs Python 3.10 to 3.13; choose one with: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# without --no-compile pip compiles every module of every package, of which a run imports a quarter
	@echo "installing into $(VENV) (a minute or two) ..."
	$(PIP) --no-compile torch==2.13.0
	$(PIP) --no-compile -e '.[dev]'
	@touch $@

run: setup  ## first look: FLARE beside its baselines on the embedded world, ends with a table that compares them
	$(BIN)/python -m flare_exp -m method=zero_shot,translate_test,lora,flare output_dir=outputs/first_look

# one thread per worker: the tests' models are small, and the numbers do not depend on the machine's cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: setup  ## all tests but those on SLURM and the notebook (what needs a GPU or ../shared is skipped with its reason)
	$(PYTEST) -m "not slurm and not notebook"

test-fast: setup  ## the tests that train nothing and take no seconds each
	$(PYTEST) -m "not slow and not slurm"

test-slurm: setup  ## the tests on a real SLURM (with one core each, minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster/test_slurm.py -m slurm

test-extras: $(VENV)/.extras  ## docs/tutorial.ipynb from its first cell to its last, and lm-evaluation-harness (minutes of one core)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_notebook.py tests/serving/test_lm_eval.py

$(VENV)/.extras: $(STAMP)
	$(PIP) --no-compile -e '.[dev,notebook,lm-eval]'
	@touch $@

GPU_REPORT := outputs/gpu_report.json

test-gpu: setup  ## what has to be seen the first time a GPU is at hand (minutes; its measurements: outputs/gpu_report.json)
	FLARE_EXP_GPU_REPORT=$(GPU_REPORT) $(BIN)/python -m pytest tests/test_gpu.py -rs
	@echo "what was measured: $(GPU_REPORT)"

# W&B's package for sweeps needs numpy < 2, so it has an environment of its own
SWEEPS := .venv-sweeps

test-sweeps: setup-sweeps  ## W&B sweep files against W&B's own schema and scheduler
	$(SWEEPS)/bin/python sweeps/validate.py

setup-sweeps: $(SWEEPS)/.installed

$(SWEEPS)/.installed:
	$(PYTHON) -m venv $(SWEEPS)
	$(SWEEPS)/bin/pip install --quiet --disable-pip-version-check 'sweeps==0.3.0' 'numpy<2'
	@touch $@

# the invariants on what PEFT and transformers have published last, whatever pyproject.toml and constraints.txt allow
NEWEST := .venv-newest

test-newest:  ## the invariants and fusion functions with the newest PEFT and transformers (in .venv-newest; may fail)
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check $(PINS) torch==2.13.0
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check $(PINS) -e '.[dev]'
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade peft transformers
	@$(NEWEST)/bin/python -c 'import peft, torch, transformers as t; print(f"peft {peft.__version__}, transformers {t.__version__}, torch {torch.__version__}")'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 tests/flare/test_invariants.py tests/flare/test_fusion.py

toy-table: setup  ## the embedded world's table: methods, ablations, fusion functions, 3 seeds (an hour of one core)
	PYTHON=$(BIN)/python sweeps/toy_table.sh

toy-tasks: setup  ## sentiment, inference and questions x three families of the embedded world, 3 seeds (two to four core-hours, by estimate)
	PYTHON=$(BIN)/python sweeps/toy_tasks.sh

mt-gain: setup  ## translation quality against gain: FLARE, FLARE MT, LoRA with a tiny NLLB and with human translations (three core-hours, by estimate)
	PYTHON=$(BIN)/python sweeps/mt_gain.sh

nusax: setup  ## NusaX with a real checkpoint: make nusax MINILM=<folder> DATA=<folder> (about an hour)
	PYTHON=$(BIN)/python MINILM="$(MINILM)" DATA="$(DATA)" sweeps/nusax_minilm.sh

xnli-tydiqa: setup  ## XNLI and TyDiQA with a real checkpoint: make xnli-tydiqa MINILM=<folder> DATA=<folder> (hours; not yet timed)
	PYTHON=$(BIN)/python MINILM="$(MINILM)" DATA="$(DATA)" sweeps/xnli_tydiqa_minilm.sh

evidence: setup  ## four benchmarks with multilingual-e5-small: make evidence E5=<folder> DATA=<folder>; again: goes on (292 runs; not yet timed)
	PYTHON=$(BIN)/python E5="$(E5)" DATA="$(DATA)" sweeps/evidence.sh

reliability: setup  ## FLARE, robust FLARE and baselines with bad test translations: make reliability E5=<folder> DATA=<folder> (459 runs)
	PYTHON=$(BIN)/python E5="$(E5)" DATA="$(DATA)" sweeps/reliability.sh

REPORT     ?= outputs/evidence
REPORT_OUT ?= docs/report/$(notdir $(REPORT))

report: setup  ## docs/report/evidence.html and .md from the runs of `make evidence`; of others: make report REPORT=<folder>
	mkdir -p $(dir $(REPORT_OUT))
	$(BIN)/python -m flare_exp report "$(REPORT)" --out "$(REPORT_OUT).html"
	$(BIN)/python -m flare_exp report "$(REPORT)" --out "$(REPORT_OUT).md"

lint: setup  ## ruff: style and formatting; import-linter: who may import whom; codespell: spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell flare_exp conf sweeps docs *.md Makefile pyproject.toml

types: setup  ## mypy
	$(BIN)/mypy

format: setup  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

DOCS := $(VENV)/.docs

docs: $(DOCS)  ## build the documentation site into site/ (strict: no dead link)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(DOCS): $(STAMP)
	$(PIP) --no-compile -e '.[docs]'
	@touch $@

wheel: setup  ## build dist/*.whl (contains conf/)
	$(BIN)/python -m build --wheel

RELEASE := $(VENV)/.release

dist: $(RELEASE)  ## build dist/*.tar.gz and, from it, dist/*.whl, and check both as a package index would
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

$(RELEASE): $(STAMP)
	$(PIP) --no-compile -e '.[release]'
	@touch $@

clean:  ## remove the virtual environment and build products (keeps outputs/ and the artifact cache)
	rm -rf $(VENV) $(SWEEPS) $(NEWEST) dist build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
