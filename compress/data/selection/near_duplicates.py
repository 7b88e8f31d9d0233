"""Finds exact and near duplicates among rows: MinHash signatures, LSH bands, and the true Jaccard for the verdict.

`find_duplicates` gives for every row the kept row that it repeats. Signatures come from rensa; the bands only bring
up candidates, and a candidate counts when the Jaccard similarity of the two shingle sets, worked out in full, reaches
the threshold. So LSH decides the recall, never the precision.

Requests that differ in one slot value ("dim the lights to 30", "... to 40") are no duplicates although most of their
shingles agree: rows are compared only within a group of equal answers (``compare``) and equal numbers
(``same_numbers``). Knows nothing of stages or files. Sources: Broder 1997; Leskovec et al., Mining of Massive
Datasets, section 3.4 (banding).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import rensa
from numpy.typing import NDArray

from compress.data.characters import FROZEN, fold
from compress.data.rows import Row, canonical_json
from compress.data.words import words

NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
CHUNK = 4096  # rows per call of rensa; bounds the memory for shingle sets
CHARS_PER_SHINGLE, WORDS_PER_SHINGLE = 3, 5


@dataclass(frozen=True, slots=True)
class Rules:
    """What counts as a near duplicate; the fields are those of `DedupParams`."""

    threshold: float = 0.8
    compare: Literal["all", "prompt", "joined"] = "all"
    same_numbers: bool = True
    unit: Literal["auto", "chars", "words"] = "auto"
    shingle: int | None = None
    num_perm: int = 128
    recall: float = 0.99
    near: bool = True


@dataclass(frozen=True, slots=True)
class Match:
    """This row repeats the kept row ``of`` (an index); ``jaccard`` is None for an exact duplicate."""

    of: int
    jaccard: float | None


# ---------------------------------------------------------------------------------- maths


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """Chance that two sets of this Jaccard similarity share at least one band: 1 - (1 - s^r)^b."""
    return float(1.0 - (1.0 - similarity**rows) ** bands)


def choose_bands(threshold: float, num_perm: int, recall: float) -> tuple[int, int]:
    """``(bands, rows)`` with the most rows per band, so the fewest idle candidates, that still reaches ``recall``.

    Recall is the S-curve at the threshold itself, where it is lowest. One row per band when nothing reaches it.
    """
    for rows in range(num_perm, 1, -1):
        if candidate_probability(threshold, num_perm // rows, rows) >= recall:
            return num_perm // rows, rows
    return num_perm, 1


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection by size of the union; 1 for two empty sets."""
    both = len(a & b)
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def shingles(text: str, *, unit: str, size: int) -> frozenset[str]:
    """All runs of ``size`` characters or words of ``text``; the whole text when it is shorter.

    Letter case and punctuation do not count. Characters: one space on either side, so that word ends weigh in.
    """
    found = words(text) or text.split()
    if unit == "words":
        return frozenset(" ".join(found[i : i + size]) for i in range(max(len(found) - size + 1, 1)))
    padded = f" {' '.join(found)} "
    return frozenset(padded[i : i + size] for i in range(max(len(padded) - size + 1, 1)))


def signatures(sets: Sequence[Iterable[str]], *, num_perm: int, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures by rensa: (rows, num_perm) uint32; equal entries estimate the Jaccard similarity."""
    if not sets:
        return np.zeros((0, num_perm), dtype=np.uint32)
    matrix = rensa.RMinHash.digest_matrix_from_token_sets([list(s) for s in sets], num_perm, seed)
    return np.asarray(matrix.to_rows(), dtype=np.uint32)


def band_hashes(
    signature: NDArray[np.uint32], groups: NDArray[np.uint64], *, bands: int, rows: int
) -> NDArray[np.uint64]:
    """One 64-bit key per row and band, (n, bands); rows of different groups, and bands, never share a key.

    ``groups`` (n,) uint64. Keys may collide by chance, which costs a comparison and changes no verdict.
    """
    parts = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    prime = np.uint64(0x100000001B3)
    keys = groups[:, None] ^ (np.arange(bands, dtype=np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15))
    for column in range(rows):
        keys = (keys ^ parts[:, :, column]) * prime  # wraps: FNV-1a over 32-bit words
        keys ^= keys >> np.uint64(29)
    return np.asarray(keys, dtype=np.uint64)


# ---------------------------------------------------------------------------------- what is compared


def normal_text(text: str) -> str:
    """Compatibility forms folded, lower case, single spaces."""
    return " ".join(fold(text if text.isascii() else FROZEN.normalize("NFKC", text)).split())


def answer_key(row: Row) -> str:
    """What two answers must agree in: canonical JSON where it is JSON, else the text without layout."""
    text = row.answer.strip()
    if text[:1] in ("{", "["):
        try:
            return canonical_json(json.loads(text))
        except (ValueError, RecursionError):
            pass  # not JSON after all: compared as text
    return " ".join(text.split())


def _turns(row: Row) -> str:
    return "\n".join(f"{m['role']}: {m['content']}" for m in row.prompt)


def exact_key(row: Row, compare: str) -> tuple[str, str, str]:
    """Rows with equal keys are exact duplicates. A text's label counts as its answer."""
    if not row.is_chat:
        return "text", normal_text(row.text), "" if compare == "prompt" else row.label or ""
    return "chat", normal_text(_turns(row)), "" if compare == "prompt" else answer_key(row)


def _near_text(row: Row, compare: str) -> str:
    """The text whose shingles are compared."""
    if not row.is_chat:
        return row.text
    asked = "\n".join(m["content"] for m in row.prompt)
    return f"{asked}\n{row.answer}" if compare == "joined" else asked


def _group(row: Row, text: str, rules: Rules) -> tuple[str, ...]:
    """Rows of different groups are never near duplicates."""
    answer = ""
    if rules.compare == "all":
        answer = answer_key(row) if row.is_chat else row.label or ""
    numbers = " ".join(NUMBER.findall(text)) if rules.same_numbers else ""
    return "chat" if row.is_chat else "text", answer, numbers


# ---------------------------------------------------------------------------------- the search


def find_duplicates(rows: Sequence[Row], rules: Rules, *, order: Sequence[int], seed: int) -> list[Match | None]:
    """For every row the kept row that it repeats, or None when it is kept itself.

    Rows are taken in ``order``; a row is dropped when it repeats one that was kept before. So no two kept rows are
    near duplicates (but for what LSH misses), and every dropped row has a kept one within the threshold: a chain of
    small changes is not followed further than that.
    """
    found: list[Match | None] = [None] * len(rows)
    first: dict[tuple[str, ...], int] = {}
    unique: list[int] = []
    for index in order:
        key = exact_key(rows[index], "all" if rules.compare == "joined" else rules.compare)
        if key in first:
            found[index] = Match(first[key], None)
        else:
            first[key] = index
            unique.append(index)
    if rules.near:
        for index, match in _near(rows, rules, unique, seed).items():
            found[index] = match
        _follow(found)
    return found


def _follow(found: list[Match | None]) -> None:
    """An exact duplicate of a row that was then dropped as a near duplicate names the row that stayed."""
    for index, match in enumerate(found):
        if match is not None and match.jaccard is None:
            further = found[match.of]
            if further is not None:
                found[index] = further


def _digest(key: tuple[str, ...]) -> bytes:
    return blake2b("\x00".join(key).encode(), digest_size=16).digest()


def _near(rows: Sequence[Row], rules: Rules, unique: Sequence[int], seed: int) -> dict[int, Match]:
    texts = {index: _near_text(rows[index], rules.compare) for index in unique}
    groups = {i: int.from_bytes(_digest(_group(rows[i], texts[i], rules))[:8], "little") for i in unique}
    sizes = Counter(groups.values())
    wanted = [index for index in unique if sizes[groups[index]] > 1]  # alone in its group: nothing to compare with

    def shingle_set(index: int) -> frozenset[str]:
        return _shingles_of(rows[index], texts[index], rules)

    cached = lru_cache(maxsize=65_536)(shingle_set)
    buckets: dict[int, list[int]] = {}
    found: dict[int, Match] = {}
    for index, keys in zip(wanted, _shared_keys(wanted, shingle_set, groups, rules, seed=seed), strict=True):
        if not keys:
            continue
        candidates = {candidate for key in keys for candidate in buckets.get(key, ())}
        alike = sorted(c for c in candidates if groups[c] == groups[index])
        match = _best(cached(index), alike, cached, rules.threshold) if alike else None
        if match is not None:
            found[index] = match
            continue
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return found


def _shared_keys(
    wanted: Sequence[int],
    shingle_set: Callable[[int], frozenset[str]],
    groups: Mapping[int, int],
    rules: Rules,
    *,
    seed: int,
) -> Iterator[list[int]]:
    """For every wanted row the band keys, as small numbers, that some other row has too."""
    bands, per_band = choose_bands(rules.threshold, rules.num_perm, rules.recall)
    parts: list[NDArray[np.uint64]] = [np.zeros((0, bands), dtype=np.uint64)]
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        signature = signatures([shingle_set(index) for index in chunk], num_perm=rules.num_perm, seed=seed)
        ids = np.array([groups[index] for index in chunk], dtype=np.uint64)
        parts.append(band_hashes(signature, ids, bands=bands, rows=per_band))
    keys = np.concatenate(parts)
    _, number, count = np.unique(keys, return_inverse=True, return_counts=True)
    number = number.reshape(keys.shape)
    shared = count[number] > 1
    for row_numbers, row_shared in zip(number, shared, strict=True):
        yield row_numbers[row_shared].tolist()


def _shingles_of(row: Row, text: str, rules: Rules) -> frozenset[str]:
    unit = rules.unit if rules.unit != "auto" else ("chars" if row.is_chat else "words")
    default = CHARS_PER_SHINGLE if unit == "chars" else WORDS_PER_SHINGLE
    return shingles(normal_text(text), unit=unit, size=rules.shingle or default)


def _best(
    own: frozenset[str], candidates: Sequence[int], shingle_set: Callable[[int], frozenset[str]], threshold: float
) -> Match | None:
    """The most similar candidate at or above the threshold; the first of equals."""
    best: Match | None = None
    for candidate in candidates:
        other = shingle_set(candidate)
        if min(len(own), len(other)) / max(len(own), len(other)) < threshold:  # the most that Jaccard can be
            continue
        similarity = jaccard(own, other)
        if similarity >= threshold and (best is None or similarity > (best.jaccard or 0.0)):
            best = Match(candidate, similarity)
    return best
