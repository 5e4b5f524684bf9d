# Two commands on a fresh machine: `make demo` runs the main job, `make test` runs the suite. Both make their own environment.
PYTHON ?= python3
LEVEL ?= easy
DATA ?= data
RECIPE ?= recipes/unified.yaml
OUT ?= runs/demo
TRAIN_FLAGS ?=
SCENES_FLAGS ?= --train 2000 --val 150 --testA 150 --testB 150 --no-target 0.15
BIN = .venv/bin

.PHONY: demo test check lint clean

.venv/installed: setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on --constraint .ci/constraints.txt --editable '.[all]'
	touch $@

demo: .venv/installed
	$(BIN)/python demo/scenes.py $(DATA)/scenes-$(LEVEL) --level $(LEVEL) $(SCENES_FLAGS)
	$(MAKE) --no-print-directory $(DATA)/$(LEVEL)/build.json
	$(BIN)/python train.py $(RECIPE) --dataset $(DATA)/$(LEVEL) --output_dir $(OUT) $(TRAIN_FLAGS)

$(DATA)/%/build.json: $(DATA)/scenes-%/instances.json
	$(BIN)/python grefcoco.py build --annotations $(<D) --images $(<D)/train2014 --out $(@D)

test: .venv/installed
	@echo "The whole suite: 10 to 25 minutes on two cores; 'make check' takes about 3 to 5."
	$(BIN)/python -m pytest

check: lint  # before a commit
	@echo "The fast suite: 3 to 5 minutes on two cores."
	$(BIN)/python -m pytest -m 'not slow'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv data runs build dist *.egg-info
