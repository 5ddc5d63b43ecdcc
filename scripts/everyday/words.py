"""The open words of the everyday data: names, cities, kinds of music.

In: nothing. Out: sorted tuples of words. The lists are short, because a small model that has seen a few thousand rows
spells the words it knows and guesses at others. Refuses to know sentences and calls.
"""

from __future__ import annotations

import re


def words(text: str) -> tuple[str, ...]:
    """The comma-separated words of a text, sorted, each once."""
    return tuple(sorted({" ".join(part.split()) for part in text.split(",") if part.strip()}))


def bare(value: str) -> str:
    """Without a leading article or `my`, which are not part of a name."""
    return re.sub(r"^(the|a|an|my) ", "", value)


PEOPLE = words(
    """Anna, Clara, Daniel, Emma, Henry, Jack, Laura, Maria, Oliver, Peter, dad, mum, my boss, the dentist"""
)
CITIES = words("Athens, Berlin, Chicago, Dublin, London, Madrid, Oslo, Paris, Rome, Tokyo")
GENRES = words("blues, classical, country, disco, jazz, opera, pop, reggae, rock, soul")
