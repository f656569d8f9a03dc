# Each command first completes .venv and runs in it. To use your own environment: make test PY=/path/to/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ifdef PY
ENV :=
else
PY := .venv/bin/python
ENV := env
endif

DATA ?= toy
MODEL ?= maskformer2
OUTPUT ?= output/recipe$(if $(filter-out maskformer2,$(MODEL)),-$(MODEL))$(if $(filter-out toy,$(DATA)),-$(DATA))
export MPLBACKEND ?= Agg

.PHONY: help env recipe test lint format clean distclean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env:  ## complete .venv: the pinned packages, detectron2, and this package with its extension
	@$(PYTHON) tools/setup_env.py

recipe: $(ENV)  ## train, derive, fit and evaluate: MODEL=maskformer2|detr, DATA=toy|nuclei, NUCLEI_RAW=<folder>, OUTPUT=<folder>, ARGS=...
	$(PY) tools/recipe.py --model $(MODEL) --data $(DATA) $(if $(NUCLEI_RAW),--nuclei-raw "$(NUCLEI_RAW)") --output "$(OUTPUT)" $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(ENV)  ## run all tests and style checks, with a process per core; choose with ARGS="-k word"
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(ENV)  ## run only the style checks
	$(PY) -m pytest -q tests/test_style.py

format: $(ENV)  ## let ruff and clang-format rewrite the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find eco_m2f -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | xargs -r $(dir $(PY))clang-format -i

clean:  ## remove built files, caches and output/
	rm -rf build output .pytest_cache .ruff_cache *.egg-info .venv/.stamp-project
	find eco_m2f tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	find eco_m2f -name '*.so' -delete

distclean: clean  ## also remove .venv
	rm -rf .venv
