# make demo          everything from nothing: packages, training on shapes, samples, pictures
# make demo-d2it     the same for the second system, d2it/
# make test          packages and the test suite
# make test-faults   the slow tests: kill, tear and fill things
# make test-page     the pages of explain.py, clicked on in Chromium
# make lint          ruff, with the rules in pyproject.toml
# make clean         remove the packages, the demos' runs and caches

PYTHON ?= python3
BIN    := .venv/bin
RUN    := runs/demo
D2IT   := runs/demo-d2it
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# a process per core, or one more (tests/conftest.py), each with tests of its own (pytest-xdist);
# plain pytest runs them too
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo demo-d2it test test-faults test-page lint clean

demo: .venv/ready
	$(BIN)/python train.py --preset tiny --run $(RUN)
	$(BIN)/python sample.py --run $(RUN) --generator ar & \
		$(BIN)/python sample.py --run $(RUN) --generator maskgit && wait $$!
	$(BIN)/python eval_fid.py --run $(RUN) --train_features 150 --num_samples 500
	$(BIN)/python explain.py --run $(RUN)

demo-d2it: .venv/ready
	$(BIN)/python -m d2it.train --preset d2it-tiny --run $(D2IT)
	$(BIN)/python -m d2it.train --preset d2it-tiny --run $(D2IT)-fine --grain_policy fine --stage 1
	$(BIN)/python -m d2it.sample --run $(D2IT)
	$(BIN)/python -m d2it.sample --run $(D2IT) --npz $(D2IT)/samples.npz --num_samples 500 \
		--steps 25 --json $(D2IT)/samples.json
	$(BIN)/python eval_fid.py --images $(D2IT)/samples.npz --data shapes \
		--judge $(D2IT)/tinycnn.pt --train_features 300 --json $(D2IT)/summary.json
	$(BIN)/python -m d2it.explain --run $(D2IT) --against $(D2IT)-fine

test: .venv/ready-dev
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-faults: .venv/ready-dev
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m faults

# Where there is no Chromium and apt cannot install it, one line says so.
test-page: .venv/ready-dev
	@if command -v chromium > /dev/null \
		|| { apt-get update && apt-get install -y chromium; } > /dev/null 2>&1; \
	then $(BIN)/python -m pytest -q -m page; \
	else echo "test-page: skipped, as there is no chromium here, and apt cannot install it"; fi

lint: .venv/ready-dev
	$(BIN)/python -m ruff check .

# Made again when the list of packages changes.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv $(RUN) $(D2IT) $(D2IT)-fine .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
