# make demo    everything from nothing: packages, training on the built-in shapes, samples, pictures, a summary
# make test    packages and the test suite
# make test-faults    the slow tests: kill, tear and fill things
# make lint    ruff, with the rules in pyproject.toml
# make clean   remove the packages, the demo's run and caches

PYTHON ?= python3
BIN    := .venv/bin
RUN    := runs/demo

.PHONY: demo test test-faults lint clean

demo: .venv/ready
	$(BIN)/python train.py --preset tiny --run $(RUN)
	$(BIN)/python sample.py --run $(RUN) --generator ar
	$(BIN)/python sample.py --run $(RUN) --generator maskgit
	$(BIN)/python eval_fid.py --run $(RUN) --train_features 300 --num_samples 500
	$(BIN)/python explain.py --run $(RUN)

test: .venv/ready
	$(BIN)/python -m pytest -q

test-faults: .venv/ready
	$(BIN)/python -m pytest -q -m faults

lint: .venv/ready
	$(BIN)/python -m ruff --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check ruff
	$(BIN)/python -m ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv $(RUN) .pytest_cache __pycache__ tests/__pycache__
