"""One thread and one hypothesis profile for every test: spinning threads are slow on shared machines."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("lorica", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorica")
