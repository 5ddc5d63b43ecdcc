"""A working directory in which tinker-cookbook's recipes run unmodified and offline: `python -m scripts.cookbook`."""
