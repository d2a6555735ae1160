# Every target sets up what it needs by itself; a second run finds it in place.
PY := .venv/bin/python
ifdef ENGINE
export LAB_ENGINE := $(ENGINE)
endif
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E)

.PHONY: help setup setup-lab demo lab lab-down test test-unit test-netns test-kernel test-engine lint types bench plugin wheel release docs picture clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install what is missing: Debian/Ubuntu packages and a virtualenv
	@lab/setup.sh

setup-lab: # of that what the demo and the lab need
	@lab/setup.sh lab

demo: setup-lab ## two Docker Engines, one network, a ping by name across, and what it looks like on the wire
	@$(SUDO) $(PY) -m lab.demo

lab: setup-lab ## start two Docker Engines with weft and leave them running
	@$(SUDO) $(PY) -m lab up

lab-down: ## remove the lab
	@$(SUDO) $(PY) -m lab down

test: test-unit test-netns test-kernel test-engine ## all tiers

test-unit: setup ## the pure core and the API over fakes: two minutes, no root
	@$(PY) -m pytest tests/unit

test-netns: setup ## the real kernel, in namespaces made for the purpose (root)
	@$(SUDO) $(PY) -m pytest --numprocesses=2 --dist=loadfile tests/netns

test-kernel: setup ## the kernel's part of that on Debian's kernel, in QEMU; QEMU and the kernel are fetched when first needed
	@$(PY) -m lab.kernel

test-engine: setup ## real Docker Engines (root); three files at a time, as most of it is waiting
	@$(SUDO) $(PY) -m pytest --numprocesses=3 --dist=loadfile tests/engine

lint: setup ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: setup ## mypy, strict
	@$(PY) -m mypy

bench: setup ## weft against Docker's overlay, bridge and the raw underlay, in one run
	@$(SUDO) $(PY) -m bench

plugin: setup ## build the managed plugin's image, rootfs and config.json into build/plugin
	@$(SUDO) deploy/build-plugin.sh

wheel: setup ## the wheel of the last commit, into build/release
	@rm -rf build/release
	@deploy/build-wheel.sh build/release

release: wheel ## what is released, into build/release, with digests: the wheel, the plugin that a Docker Engine builds, and the service
	@rm -f build/weft-plugin-*
	@git diff --quiet HEAD && test -z "$$(git status --porcelain plugin)" || { echo "commit first: the plugin is built from what is here"; exit 1; }
	@$(SUDO) deploy/build-plugin.sh >/dev/null
	@mv build/weft-plugin-* build/release
	@cp deploy/weft.env deploy/weft.service build/release
	@cd build/release && sha256sum weft* | tee SHA256SUMS

docs: setup ## write docs/cli.md anew from the command line's parser
	@$(PY) docs/cli.py

picture: setup ## take docs/page.png anew, of the page over a sample
	@PYTHONPATH=.:plugin $(PY) docs/page.py

clean: ## forget what was built
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
