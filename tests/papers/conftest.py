"""A paper of two seconds: one scalar for each of two methods, with all that a page can show."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field

from lorica.core.config import Config
from lorica.papers.base import Figure, PaperCheck, Verdict
from lorica.papers.kit.judging import above
from lorica.papers.kit.plot import Plot


class CoinSettings(Config):
    throws: int = Field(8, ge=1, description="throws of each coin")
    bias: tuple[float, ...] = Field((0.5, 0.9), description="chance of heads of each coin")


class Coin(PaperCheck[CoinSettings]):
    """Two coins are thrown, and the *heads* are counted."""

    name = "coin"
    title = "A Coin | and Another"
    authors = "Nobody"
    venue = "NoConf"
    year = 2020
    arxiv = "0000.00000"
    methods = ("lora",)
    claim = "The second coin shows heads more often."
    figures = (Figure("heads", "1 ± 2"), Figure("tails", "3", "from memory"))
    limits = "It says nothing about dice."
    keys = ("coin", "lr")
    columns: ClassVar = {"heads": "share of heads", "never": "what is never reached"}
    small = CoinSettings(throws=100)
    full = CoinSettings(throws=1000)
    reduced = CoinSettings(throws=50)

    def run(self, settings, seed, say):
        import torch

        say(f"throwing with seed {seed}")
        found = []
        for number, chance in enumerate(settings.bias):
            heads = (torch.rand(settings.throws) < chance).float().mean()
            row = {"coin": f"c{number}", "lr": 1e-3, "heads": float(heads)}
            found.append(row | ({"never": float("inf")} if number else {}))
        return found

    def judge(self, table):
        gain = table.cell("heads", coin="c1") - table.cell("heads", coin="c0")
        return Verdict(above(gain), f"It gains {gain.mean:.2f}.")

    def plots(self, table):
        return (Plot("coins", "coin", "heads", (table.series("heads", "coin", "heads"),)),)


@pytest.fixture
def coin():
    return Coin()


@pytest.fixture
def known(coin, monkeypatch):
    """The index holds the coin alone, wherever it is asked."""
    import lorica.papers

    monkeypatch.setattr(lorica.papers, "all_papers", lambda: {"coin": coin})
    return coin
