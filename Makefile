# make demo          set up, and continue a story with the bundled model
# make app           set up, and a page on which the bundled model writes, at http://127.0.0.1:7860
# make test          set up, and run the tests, in minutes
# make test-slow     the tests that it leaves out
# make test-all      both, with coverage, the notebooks, and the tests on random input with thousands of them
# make fuzz          these for an hour or two
# make soak          an hour of hostile clients, 2,000 generations, 50 rounds of training: memory and text stay the same
# make test-oldest   what depends on transformers, on the oldest supported one, with the packages of the extra [clients]
# make test-newest   the quick ones of these without constraints, so on the newest one that setup.cfg allows
# make test-upstream the common tests in transformers' source distribution, on our classes (docs/inside/upstream_tests.md)
# make test-gpu      set up, and run the tests that need a GPU
# make docs          the pages of docs/ as a site, in build/site, and a check of their links
# make style         ruff, and pyright on all but the tests
# make speed         the speed tables and their picture, measured anew: a quarter of an hour on a quiet machine
# make experiments   the paper's tables in miniature: hours; resumes where it was stopped. CORPUS=DIR adds stories
# make release       VERSION=x.y.z: the demo's Hub repository, wheel and sdist, in build/release. PUSH=NAME uploads the former
PYTHON ?= python3
BIN := .venv/bin
COMPAT := .venv-compat/bin
NEWEST := .venv-newest/bin
SOURCES := setup.cfg pyproject.toml

.PHONY: demo app test test-slow test-all fuzz test-oldest test-newest test-upstream test-gpu style docs experiments speed
.PHONY: release clean

demo: .venv/.base
	$(BIN)/calm generate .

app: .venv/.app
	$(BIN)/calm app .

test: .venv/.full
	$(BIN)/python -m pytest -m "not slow and not gpu" $(COVERAGE)

test-slow: .venv/.full
	$(BIN)/python -m pytest -m "slow and not gpu" $(COVERAGE)

# A variable of a target is one of its prerequisites, too.
test-all: COVERAGE = --cov --cov-append --cov-report=
test-all: test test-slow .venv/.docs
	EXAMPLE_STEPS=3 $(BIN)/python -m pytest -n 0 --nbmake examples/*.ipynb
	$(BIN)/python -m pytest -m fuzz --hypothesis-profile=whole $(COVERAGE)
	$(BIN)/coverage report --skip-covered --show-missing
	$(BIN)/coverage erase

fuzz: .venv/.full
	$(BIN)/python -m pytest -m fuzz --hypothesis-profile=hour

soak: .venv/.full
	SOAK_SECONDS=3600 $(BIN)/python -m pytest -n 0 -s tests/test_soak.py tests/test_serve_soak.py

test-oldest: .venv-compat/.full
	$(COMPAT)/python -m pytest -m "transformers and not gpu"

# Always from scratch, for what pip finds changes. torch alone is pinned: its default build is gigabytes.
test-newest:
	rm -rf build .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install -q "$$(grep ^torch== constraints.txt)" .
	cd .venv-newest && bin/calm --help > /dev/null && bin/python ../tests/wheel_commands.py
	$(NEWEST)/python -m pip install -q ".[test,onnx]"
	$(NEWEST)/python -m pytest -m "transformers and not slow and not gpu"

test-upstream: .venv/.upstream
	$(BIN)/python -m pytest -o addopts=-q -W always::FutureWarning -W ignore::pytest.PytestWarning tests/upstream_suite.py

test-gpu: .venv/.full
	$(BIN)/python -m pytest -m gpu -n 0

style: .venv/.style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

experiments: .venv/.full
	$(BIN)/calm experiments $(if $(CORPUS),--corpus "$(CORPUS)")

speed: .venv/.full
	$(BIN)/calm bench speed --folder runs/speed

release: .venv/.full .venv-compat/.full
	rm -rf build/release
	mkdir -p build
	$(BIN)/python -m calm_transformers.conversion.release --version "$(VERSION)" --output build/release \
	    --python $(BIN)/python $(COMPAT)/python $(if $(PUSH),--push_to_hub "$(PUSH)")

clean:
	rm -rf .venv .venv-compat .venv-newest build *.egg-info

# pyright, in an editor too, knows nothing of a package whose files stand elsewhere: stubPath names this link.
.venv/.base: $(SOURCES) constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	mkdir -p .venv/typings/calm_transformers
	ln -sfn ../../.. .venv/typings/calm_transformers/model
	touch $@

.venv/.app: .venv/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[app]"
	touch $@

.venv/.full: .venv/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv/.upstream: .venv/.full
	rm -rf .venv/transformers-*
	$(BIN)/python -m pip install -q parameterized==0.9.0
	$(BIN)/python -m pip download -q -d .venv --no-deps --no-binary :all: --no-build-isolation \
	    "$$(grep ^transformers== constraints.txt)"
	tar -xf .venv/transformers-*.tar.gz -C .venv
	touch $@

.venv/.docs: .venv/.full
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

.venv/.style: .venv/.full
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[style]"
	touch $@

.venv-compat/.full: $(SOURCES) constraints-compat.txt
	$(PYTHON) -m venv .venv-compat
	$(COMPAT)/python -m pip install -q -c constraints-compat.txt -e ".[test,clients]"
	touch $@
