"""Names for messages, the closest to a word first."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def names_like(given: object, names: Sequence[str], most: int = 20) -> str:
    """Names for a message, the closest first and of many not all."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(closest_first(str(given), names)[:most]) + more) or "(none)"


def closest_first(word: str, names: Sequence[str]) -> list[str]:
    """Names by how likely each was meant: those that hold the word, then by likeness."""
    return sorted(names, key=lambda name: (word not in name, -difflib.SequenceMatcher(None, word, name).ratio()))
