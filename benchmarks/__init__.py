"""Benchmarks: each prints ratios of its own run, so that the machine's speed cancels out. `python -m
benchmarks.<name>`.

One thread that does not spin, unless the environment says otherwise; set here, before torch is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
