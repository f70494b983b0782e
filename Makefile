# Two commands: `make demo` and `make test`. Both set up their own environment first (.venv, exact versions).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # or each of the processes that a test starts compiles the package anew

.PHONY: demo test tests test-long test-export lint format easy-vqa clean

demo: .venv/ready  ## train a multimodal LLM from nothing and talk to it: minutes on two CPU cores, offline
	$(BIN)/python recipes/tiny/demo.py

test: .venv/ready  ## everything CI runs, on two cores: the checks of `lint` while the tests leave a core idle
	$(MAKE) --no-print-directory --jobs 2 lint tests

tests: export OMP_NUM_THREADS := 1
tests: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: export OMP_NUM_THREADS := 1
test-long: .venv/ready  ## the campaigns: runs killed at random, hundreds of steps that must not hang
	$(BIN)/python -m pytest -m long --timeout 3600 -s

test-export: export OMP_NUM_THREADS := 1
test-export: .venv/transformers-4.57/finished  ## exported folders, loaded by the transformers before 5 as well
	MLLM_TRANSFORMERS_4_57=.venv/transformers-4.57 $(BIN)/python -m pytest tests/export tests/test_hub.py -m 'long or not long' --timeout 900

.venv/transformers-4.57/finished: .venv/ready
	$(BIN)/pip install --quiet --upgrade --target .venv/transformers-4.57 transformers==4.57.6
	touch $@

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv || (echo "python3 cannot make a venv: on Debian, apt-get install python3-venv" && false)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m compileall -q .venv/lib/python*/site-packages/torch > .venv/compiled.log & \
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' && wait  # pip itself would use one core
	touch .venv/ready

clean:
	rm -rf .venv runs
