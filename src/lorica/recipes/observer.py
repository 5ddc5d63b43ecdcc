"""What a long recipe tells as it goes: sentences, and stages with their progress.

In: nothing. Out: `Observer`, which says nothing; who shows progress overrides it. Refuses to know terminals.
"""

from __future__ import annotations


class Observer:
    """What a comparison or a search tells as it goes. The base class says nothing."""

    def say(self, text: str) -> None:
        """A sentence for the person who waits."""

    def stage(self, text: str, total: int) -> None:
        """Work of `total` units begins."""

    def advance(self, units: int) -> None:
        """So much of it is done."""
