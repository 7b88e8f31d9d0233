"""Write the assistant's data: a pool that is noisy on purpose, a clean reference sample, and the test.

    python -m profiles.quickstart.make_data --out profiles/quickstart

Deterministic by seed. ``pool.jsonl`` and ``reference.jsonl`` come from the training side of the grammar,
``test.jsonl`` from the test side. ``pool_noise.jsonl`` tells which pool line was spoilt and how; it is there
to measure the data stages by, and no stage reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

from profiles.quickstart import grammar
from profiles.quickstart.slots import words

POOL_ROWS, REFERENCE_ROWS, TEST_ROWS = 9000, 600, 1000
Pair = dict[str, str]

# share of the pool that is spoilt, by kind; the rest is clean
NOISE: dict[str, float] = {
    "exact_duplicate": 0.06,
    "near_duplicate": 0.08,
    "wrong_label": 0.08,
    "garbled": 0.04,
    "off_topic": 0.04,
    "abusive_tone": 0.03,
}
# harmless made-up scolding, so that the tone filter has something to find and nobody is hurt by this file
SCOLDING = ["you soggy turnip", "you wobbly teapot", "you mouldy pancake", "you grumpy radish", "you leaky bucket"]
PROSE = [
    "the committee met on a rainy afternoon and talked at great length about the colour of the new benches",
    "in the third chapter the captain finds a map that nobody in the crew is able to read",
    "to make the dough rise you should leave it in a warm place under a damp cloth for an hour",
    "our quarterly figures show a modest rise in sales of garden chairs across the northern region",
    "the lighthouse was built two centuries ago and its keeper still writes a diary every night",
]


def pair(request: grammar.Request) -> Pair:
    """A request as a row of the pool."""
    return {"prompt": request.utterance, "response": request.call}


def skewed_names(rng: Random) -> list[str]:
    """Function names in the pool's mix: the most asked comes five times as often as the rarest."""
    names = list(grammar.NAMES)
    rng.shuffle(names)
    weighted: list[str] = []
    for rank, name in enumerate(names):
        weighted += [name] * max(1, round(10 * 0.92**rank))
    return weighted


def near_duplicate(row: Pair, rng: Random) -> Pair:
    """The same request with another flourish around it."""
    said = row["prompt"].rstrip(".!?")
    return {
        "prompt": f"{rng.choice(['please ', 'hey ', 'ok '])}{said}{rng.choice([' please', ' thanks', ''])}",
        "response": row["response"],
    }


def wrong_label(row: Pair, rng: Random, names: list[str]) -> Pair:
    """Another request's call, or the right call with one number or word changed."""
    if rng.random() < 0.5:
        other = grammar.draw(rng.choice(names), rng, test=False).call
        changed = {"prompt": row["prompt"], "response": other}
        return changed if other != row["response"] else wrong_label(row, rng, names)
    call = json.loads(row["response"])
    if "args" not in call:
        return wrong_label(row, rng, names)
    name = rng.choice(sorted(call["args"]))
    value = call["args"][name]
    call["args"][name] = value + rng.randrange(1, 9) if isinstance(value, int | float) else words(rng.randrange(20))
    return {"prompt": row["prompt"], "response": json.dumps(call, separators=(",", ":"))}


def garbled(row: Pair, rng: Random) -> Pair:
    """Characters lost to a bad transfer: symbols, repeats, or the answer cut off."""
    said = row["prompt"]
    kind = rng.randrange(3)
    if kind == 0:
        symbols = "#@~^|\\%&*_<>=+"
        said = "".join(rng.choice(symbols) if rng.random() < 0.45 else c for c in said)
    elif kind == 1:
        word = rng.choice(said.split())
        said = " ".join([word] * rng.randrange(9, 16))
    else:
        return {"prompt": said, "response": row["response"][: rng.randrange(2, max(3, len(row["response"]) // 2))]}
    return {"prompt": said, "response": row["response"]}


def off_topic(rng: Random) -> Pair:
    """Prose that is no request, answered by prose that is no call."""
    first, second = rng.sample(PROSE, 2)
    cut = rng.randrange(5, 12)
    return {"prompt": f"{first} and {' '.join(second.split()[:cut])}", "response": second}


def abusive_tone(row: Pair, rng: Random) -> Pair:
    """A scolding before or after the request."""
    scolding = rng.choice(SCOLDING)
    said = f"{scolding} {row['prompt']}" if rng.random() < 0.5 else f"{row['prompt']} {scolding}"
    return {"prompt": said, "response": row["response"]}


def make_pool(seed: int, rows: int = POOL_ROWS) -> list[tuple[Pair, str]]:
    """``rows`` pairs with the kind of noise each one carries (``clean`` where none), in shuffled order."""
    rng = Random(seed)
    names = skewed_names(rng)
    counts = {kind: round(share * rows) for kind, share in NOISE.items()}
    clean = [pair(grammar.draw(rng.choice(names), rng, test=False)) for _ in range(rows - sum(counts.values()))]
    spoil: dict[str, Callable[[Pair], Pair]] = {
        "exact_duplicate": dict,
        "near_duplicate": lambda row: near_duplicate(row, rng),
        "wrong_label": lambda _: wrong_label(fresh(), rng, names),
        "garbled": lambda _: garbled(fresh(), rng),
        "off_topic": lambda _: off_topic(rng),
        "abusive_tone": lambda _: abusive_tone(fresh(), rng),
    }

    def fresh() -> Pair:
        return pair(grammar.draw(rng.choice(names), rng, test=False))

    pool = [(row, "clean") for row in clean]
    for kind, count in counts.items():
        pool += [(spoil[kind](rng.choice(clean)), kind) for _ in range(count)]
    rng.shuffle(pool)
    return pool


def make_clean(seed: int, rows: int, *, test: bool) -> list[Pair]:
    """``rows`` clean pairs of one side, every function equally often, none twice."""
    rng = Random(seed)
    seen: set[str] = set()
    pairs: list[Pair] = []
    while len(pairs) < rows:
        request = grammar.draw(grammar.NAMES[len(pairs) % len(grammar.NAMES)], rng, test=test)
        if request.utterance not in seen:
            seen.add(request.utterance)
            pairs.append(pair(request))
    rng.shuffle(pairs)
    return pairs


def write(path: Path, lines: Iterable[dict[str, object]]) -> None:
    """One JSON object per line, under a new name first."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")
    fresh.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()
    pool = make_pool(args.seed)
    write(args.out / "pool.jsonl", (dict(row) for row, _ in pool))
    write(args.out / "pool_noise.jsonl", ({"line": i + 1, "noise": k} for i, (_, k) in enumerate(pool) if k != "clean"))
    write(args.out / "reference.jsonl", (dict(row) for row in make_clean(args.seed + 1, REFERENCE_ROWS, test=False)))
    write(args.out / "test.jsonl", (dict(row) for row in make_clean(args.seed + 2, TEST_ROWS, test=True)))


if __name__ == "__main__":
    main()
