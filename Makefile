# Short names for ./run, which explains them: ./run help
COMMANDS = demo test lint format bench docs mutants test-matrix setup

.PHONY: help clean $(COMMANDS)

help:
	@./run help

$(COMMANDS):
	@./run $@ $(ARGS)

# Builds, caches and environments. Not results in outputs/.
clean:
	rm -rf build dist site .venv .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests -name __pycache__ -type d -prune -exec rm -rf {} +
