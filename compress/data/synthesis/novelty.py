"""Which requests are known already: exact and near duplicates, found at once in a growing set.

`Known.find` says whether a text repeats one that was added, `Known.add` adds. Near means that the Jaccard similarity
of the letter trigrams reaches a limit while the numbers are the same and in the same order, as in
``selection.near_duplicates``, whose measures these are. The search is exact: two sets that similar share at least one
of their few rarest shingles (prefix filter, Chaudhuri et al. 2006). Knows nothing of rows, stages or files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from compress.data.selection.near_duplicates import NUMBER, jaccard, normal_text, shingles

Found = tuple[str, str]  # how it is known ("equal" or "near"), and the origin it was added with


class Known:
    """Texts seen so far, each with the word for its origin."""

    def __init__(self, texts: Iterable[str], *, origin: str, max_similarity: float) -> None:
        self.limit = max_similarity
        self._exact: dict[str, str] = {}
        self._sets: list[tuple[frozenset[str], str]] = []
        self._by_shingle: dict[tuple[str, str], list[int]] = {}
        first = list(texts)
        self._frequency = Counter(gram for text in first for gram in self._shingles(text))
        for text in first:
            self.add(text, origin=origin)

    @staticmethod
    def _shingles(text: str) -> frozenset[str]:
        return shingles(normal_text(text), unit="chars", size=3)

    def _rarest(self, own: frozenset[str], text: str) -> list[tuple[str, str]]:
        """Keys of the shingles of which at least one is shared with every set that is similar enough.

        Any fixed order of shingles serves; the rarest first makes the fewest candidates. Numbers are in the key.
        """
        count = len(own) - math.ceil(self.limit * len(own) - 1e-9) + 1
        numbers = " ".join(NUMBER.findall(text))
        return [(numbers, gram) for gram in sorted(own, key=lambda g: (self._frequency[g], g))[:count]]

    def find(self, text: str) -> Found | None:
        """How ``text`` is known, or None when it is new."""
        exact = self._exact.get(normal_text(text))
        if exact is not None:
            return "equal", exact
        own = self._shingles(text)
        candidates = {at for key in self._rarest(own, text) for at in self._by_shingle.get(key, ())}
        for at in sorted(candidates):
            other, origin = self._sets[at]
            if jaccard(own, other) >= self.limit:
                return "near", origin
        return None

    def add(self, text: str, *, origin: str, near: bool = True) -> None:
        """Add ``text``; with ``near`` off it is known by exact repetition only."""
        self._exact.setdefault(normal_text(text), origin)
        if near:
            own = self._shingles(text)
            for key in self._rarest(own, text):
                self._by_shingle.setdefault(key, []).append(len(self._sets))
            self._sets.append((own, origin))
