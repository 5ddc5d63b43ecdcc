"""Benchmarks: each prints ratios of its own run, so that the machine's speed cancels out. `python -m
benchmarks.<name>`.
"""
