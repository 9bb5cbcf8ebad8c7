# The commands that people type; .ci/run calls the same ones.
#
#   make chat      install, fetch the default pair, talk with it (standard input goes to the chat)
#   make test      install, fetch the small test model, run the tests
#   make test-openvino   install the openvino backend, run its own tests
#   make test-export   an environment with optimum (about 1 GB), the tests of exporting checkpoints by it
#   make quality   the default target's 4-bit exports beside its GGUF on llama.cpp: WORKLOAD= and PROBLEMS= name files
#   make lint      ruff and mypy
#   make install   make .venv ready for all of them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install chat test test-pair test-openvino test-export quality lint clean

install: $(VENV)/.core $(VENV)/.dev

# Stamps: an install runs again only when pyproject.toml changes. A half-made environment has no stamp and no pip, and
# is made anew.
$(VENV)/.core: pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 </dev/null || $(PYTHON) -m venv --clear $(VENV) </dev/null
	@$(BIN)/python -m pip install --quiet --editable '.[native]' </dev/null
	@touch $@

# llama-cpp-python is compiled from source: a few minutes, once.
$(VENV)/.dev: pyproject.toml | $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev,llama,native]' </dev/null
	@touch $@

$(VENV)/.openvino: pyproject.toml | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[openvino]' </dev/null
	@touch $@

# Apart from the rest: optimum's pins are older than ours. gguf and accelerate make a checkpoint of the small model.
OPTIMUM := 'optimum-onnx[onnxruntime]==0.1.0' transformers==4.57.6 torch==2.13.0 safetensors sentencepiece gguf accelerate

$(VENV)/.optimum: pyproject.toml | $(VENV)/.dev
	$(PYTHON) -m venv --clear $(VENV)/optimum </dev/null
	$(VENV)/optimum/bin/python -m pip install --quiet $(OPTIMUM) </dev/null
	@touch $@

chat: $(VENV)/.core
	@$(BIN)/edge-spec pull qwen2.5-coder </dev/null
	@$(BIN)/edge-spec chat

test: install
	@$(BIN)/edge-spec pull smollm2-135m </dev/null
	$(BIN)/python -m pytest -m 'not pair and not openvino and not export'

# The tests that load the 1.6 GB default pair.
test-pair: install
	@$(BIN)/edge-spec pull qwen2.5-coder </dev/null
	$(BIN)/python -m pytest -m pair

# The openvino backend's own tests, the real small model among them.
test-openvino: install $(VENV)/.openvino
	@$(BIN)/edge-spec pull smollm2-135m </dev/null
	$(BIN)/python -m pytest -m openvino

# Checkpoints through the real optimum.
test-export: install $(VENV)/.optimum
	@$(BIN)/edge-spec pull smollm2-135m </dev/null
	EDGE_SPEC_OPTIMUM_PYTHON=$(CURDIR)/$(VENV)/optimum/bin/python $(BIN)/python -m pytest -m export

# Perplexity, agreement, divergence and the cost of a pass; with PROBLEMS= (HumanEval's form) also programs that pass.
# Then what a draft token costs and how often it is right, and (on Linux) what the loaded exports hold.
QUALITY_TARGET := qwen2.5-coder-1.5b
QUALITY_RECIPES ?= int4 int4-accurate int4-fast int4-plain
WORKLOAD ?=
PROBLEMS ?=

quality: install
	@$(BIN)/edge-spec pull qwen2.5-coder </dev/null
	$(BIN)/python tools/quality.py --reference llama:$(QUALITY_TARGET) \
	    $(QUALITY_RECIPES:%=onnx:$(QUALITY_TARGET)@%) --baseline onnx:$(QUALITY_TARGET)@int4-plain \
	    $(if $(WORKLOAD),--workload $(WORKLOAD) --limit 6) \
	    $(if $(PROBLEMS),--problems $(PROBLEMS) --draft qwen2.5-coder-0.5b)
	$(BIN)/python tools/draft_curve.py --points plain,draft --exports build/draft \
	    --answers build/draft/$(or $(basename $(notdir $(WORKLOAD))),samples).answers.jsonl \
	    $(if $(WORKLOAD),--workload $(WORKLOAD) --limit 4)
	$(BIN)/python tools/loaded_memory.py $(QUALITY_RECIPES:%=$(QUALITY_TARGET)@%)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
