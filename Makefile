# make help lists the targets. Everything runs in .venv, which is made on the first call and again only when a
# requirements file has changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# The demo is small: one thread each is as fast as all of them, and the same bits everywhere.
demo: export OMP_NUM_THREADS := 1
test test-all: export OMP_NUM_THREADS := 1
ON_ALL_CORES := -n auto --dist worksteal

.PHONY: help setup demo test test-all lint format bench bench-seeds bench-speed bench-methods bench-sweeps recipes readme clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv and install what is needed (about 2 minutes)

$(READY): requirements.txt requirements-dev.txt constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

demo: $(READY) ## train a teacher, distil a student, search alpha and T, print the table (digits, no download)
	$(PY) train.py --model_dir experiments/demo/teacher
	$(PY) train.py --model_dir experiments/demo/student
	$(PY) train.py --model_dir experiments/demo/student_kd
	$(PY) search_hyperparams.py --parent_dir experiments/demo/alpha_temp --jobs 2
	for run in teacher student student_kd; do $(PY) evaluate.py --model_dir experiments/demo/$$run || exit; done
	$(PY) evaluate.py --model_dir experiments/demo/teacher --split val --calibrate
	$(PY) synthesize_results.py --parent_dir experiments/demo --plots

test: $(READY) lint ## lint, then the tests that take seconds
	$(PY) -m pytest $(ON_ALL_CORES)

test-all: $(READY) lint ## the same with the slow tests
	$(PY) -m pytest $(ON_ALL_CORES) -m "slow or not slow"

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## let ruff format and mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench-seeds: $(READY) ## the five seeds' experiments scaled down (about an hour): make bench-seeds DATA_DIR=...
	$(PY) benchmarks/seeds.py --data_dir $(or $(DATA_DIR),data) --jobs 2

bench: $(READY) ## KD against the student alone on CIFAR-10, 3 seeds each (about an hour): make bench DATA_DIR=...
	$(PY) benchmarks/kd_cifar10.py --data_dir $(or $(DATA_DIR),data)

# Each is of use without images and teacher, too: then it makes up its own.
WITH = $(if $(DATA_DIR),--data_dir $(DATA_DIR)) $(if $(TEACHER),--teacher_dir $(TEACHER))

bench-speed: $(READY) ## how fast (an hour of a quiet machine): make bench-speed DATA_DIR=... TEACHER=<trained resnet18>
	$(PY) benchmarks/kd_step.py $(WITH)
	$(PY) benchmarks/kd_step.py $(WITH) --profile
	$(PY) benchmarks/grid.py $(WITH)
	$(PY) benchmarks/epoch_cost.py
	$(PY) benchmarks/start.py
	$(PY) benchmarks/kd_step.py $(WITH) --accuracy

bench-methods: $(READY) ## every method on the digits, and what a step of it costs (half an hour of a quiet machine)
	$(PY) benchmarks/methods.py --jobs 2
	$(PY) benchmarks/methods.py --costs

bench-sweeps: $(READY) ## searches (two hours of a quiet machine): make bench-sweeps DATA_DIR=... TEACHER=<trained resnet20>
	$(PY) benchmarks/sweep_scale.py
	$(PY) benchmarks/sweep_engines.py
	$(PY) benchmarks/sweep_kill.py $(WITH)
	$(PY) benchmarks/sweep_tpe.py $(WITH)

recipes: $(READY) ## write experiments/cifar100 anew, the benchmark of CIFAR-100
	$(PY) benchmarks/cifar100_recipes.py

readme: $(READY) ## write the params.json reference in README.md and the table in docs/methods.md anew
	PYTHONPATH=. $(PY) tests/test_readme.py --write

clean: ## remove .venv and caches, not results
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
