# Both commands set up .venv by themselves; nothing has to be installed beforehand but Python 3.11 or later.
PYTHON ?= python3
OUT ?= demo

.PHONY: demo test lint
.DELETE_ON_ERROR:

.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	.venv/bin/shielded demo --out $(OUT) --overwrite

test: .venv/.installed lint
	.venv/bin/python -m pytest

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
