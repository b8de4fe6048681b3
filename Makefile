# Everything a newcomer runs. `make` alone says what there is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test bench lint setup build guest

LIVE := ocr-libvirt/tests/live
GUEST := target/guest
# The state of the demo's private libvirtd. The path stays short: a unix socket's may have 107 bytes.
DEMO_STATE := $(shell echo $${TMPDIR:-/tmp})/ocr-demo.$(shell id -u)
FEATURES := --features ocr-bins/libvirt,ocr-core/conformance,ocr-core/ssh

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the Debian packages that build, demo and test need
	@.ci/setup

build: setup ## build the servers and the command line, with libvirt
	cargo build --locked --bins $(FEATURES)

guest: setup ## build the tiny guest from Debian's packages
	@$(LIVE)/build-guest $(GUEST)

demo: build guest ## the main job on a real guest: deploy, install, inject, watch, reboot, delete
	@bins/demo/run target/debug $(GUEST) $(DEMO_STATE)

test: build guest ## every test, the live ones included
	cargo test --locked --workspace $(FEATURES)

BENCH ?= queue
bench: ## measure, as ratios against a floor in the same run: make bench BENCH=queue
	cargo bench --locked $(if $(filter guest,$(BENCH)),-p ocr-libvirt --features libvirt,-p ocr-benches) --bench $(BENCH)

lint: ## format, clippy, docs, and the plain build that needs no system package
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets $(FEATURES) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps $(FEATURES)
	PROTOC=/nonexistent PKG_CONFIG=/nonexistent cargo clippy --locked -p ocr-core -p ocr-grpc -p ocr-openstack -p ocr-libvirt -p ocr-bins -- -D warnings
