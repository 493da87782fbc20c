# Everything runs in an environment of its own, .venv. Set PYTHON to use another interpreter, VENV another folder.
PYTHON ?= python3
VENV ?= .venv
RUN = saved/Demo_LT_TADE/demo
BIN = $(VENV)/bin

.PHONY: help env demo test test-core test-slow lint clean
.DEFAULT_GOAL := help

help:  ## explain every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.ready  ## make the environment and install requirements.txt

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

demo: env  ## train on long-tailed digits, evaluate every test distribution, learn expert weights, follow a stream (minutes, no download)
	rm -rf $(RUN)
	$(BIN)/python train.py -c configs/config_demo_tade.json --run_id demo
	$(BIN)/python test_all_cifar.py -r $(RUN)/last.pth
	$(BIN)/python test_train_cifar.py -c configs/test_time_demo_tade.json -r $(RUN)/last.pth
	$(BIN)/python test_train_cifar.py -c configs/test_time_demo_prior.json -r $(RUN)/last.pth -o $(RUN)/results/last/test_prior
	$(BIN)/python examples/turning_stream.py -r $(RUN)/last.pth
	@echo
	@echo "Tables and plots: $(RUN)/results/last/test_all and $(RUN)/results/last/test_train"
	@echo "A turning stream: $(RUN)/turning_stream/stream.png"
	@echo "TensorBoard:      $(BIN)/tensorboard --logdir saved"
	@echo "To look at first: $(RUN)/results/last/test_prior/report.html"

lint: env  ## check style, layout, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: lint  ## lint, then run the tests, several files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered

test-core: env  ## losses, networks, priors, stability, class profiles, and a run of every method from end to end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal tests/test_loss.py tests/test_model.py \
		tests/test_metric.py tests/test_prior.py tests/test_stability.py tests/test_asymmetry.py tests/test_calibration.py \
		tests/test_class_profiles.py tests/test_structure.py tests/test_published_scripts.py

test-slow: env  ## fuzz files, configs and options, damage every byte of a checkpoint; kill trainings at random moments
	FUZZ_CASES=10000 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_hostile_files.py
	$(BIN)/python -m pytest -m slow -s

clean:  ## remove the environment and caches (not data/ or saved/)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .coverage
	find . -name __pycache__ -not -path './data/*' -prune -exec rm -rf {} +
