"""A comparison of methods in the same batches. `recipe` runs it; the other files are its parts."""

from __future__ import annotations

from lorica.recipes.compare.config import CompareConfig
from lorica.recipes.compare.recipe import run
from lorica.recipes.compare.report import Comparison

__all__ = ["CompareConfig", "Comparison", "run"]
