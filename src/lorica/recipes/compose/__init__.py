"""Composing adapters from a few examples: weights found by search (LoraHub) or learnt at every site (LoRA-Soups)."""

from __future__ import annotations

from lorica.recipes.compose.composition import Composition, Row, save_composition
from lorica.recipes.compose.config import ComposeConfig, SoupsConfig
from lorica.recipes.compose.fewshot import FewShot, few_shot, loss_on
from lorica.recipes.compose.lorahub import compose
from lorica.recipes.compose.soups import learn_soup

__all__ = [
    "ComposeConfig",
    "Composition",
    "FewShot",
    "Row",
    "SoupsConfig",
    "compose",
    "few_shot",
    "learn_soup",
    "loss_on",
    "save_composition",
]
