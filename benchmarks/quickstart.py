"""What the data steps of a finished quickstart found of the planted noise, and how the bundle does on unseen calls.

    python -m benchmarks.quickstart .edgestill

Reads the newest run in the store: for every kind of planted noise how many rows which step took out, how many clean
rows went, and the exact match on test rows whose very call stands, or does not stand, in the rows that training saw.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from compress.data.rows import chat_row, read_dropped

DATA = Path(__file__).resolve().parents[1] / "profiles" / "quickstart"


def lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def newest(store: Path) -> tuple[dict[str, Path], dict[str, object]]:
    """Stage name -> artifact folder of the newest run, and its record."""
    record = json.loads(max(store.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime).read_text())
    return {stage["name"]: store / "artifacts" / stage["key"] for stage in record["stages"]}, record


def found(folders: dict[str, Path]) -> None:
    """Print a table: kind of noise by the step that took it out."""
    pool = [chat_row(row["prompt"], row["response"]).id for row in lines("pool.jsonl")]
    noise = {int(entry["line"]) - 1: entry["noise"] for entry in lines("pool_noise.jsonl")}
    kinds: dict[str, Counter[str]] = {}  # row id -> kinds of the lines with this content
    for at, row in enumerate(pool):
        kinds.setdefault(row, Counter())[noise.get(at, "clean")] += 1
    totals = Counter(noise.get(at, "clean") for at in range(len(pool)))
    steps = [name for name, folder in folders.items() if (folder / "dropped.parquet").is_file()]
    steps = [name for name in steps if "stabilize" not in name and "k_center" not in name]
    table: dict[str, Counter[str]] = {kind: Counter() for kind in totals}
    for step in steps:
        for dropped in read_dropped(folders[step]):
            if dropped.row.id in kinds and kinds[dropped.row.id].total():
                kind = kinds[dropped.row.id].most_common(1)[0][0]
                if step.endswith("dedup") and "exact_duplicate" in kinds[dropped.row.id]:
                    kind = "exact_duplicate"  # equal lines cannot be told apart: the copy went
                kinds[dropped.row.id][kind] -= 1
                table[kind][step] += 1
    print("planted noise taken out by each step")
    for kind, total in sorted(totals.items()):
        taken = ", ".join(f"{step.split('.')[-1]} {count}" for step, count in table[kind].items())
        print(f"  {kind:16} {sum(table[kind].values()):5} of {total:5}   {taken}")


def unseen(folders: dict[str, Path]) -> None:
    """Print the bundle's exact match by whether the reference call stands in the pool or the reference sample."""
    seen = {row["response"] for name in ("pool.jsonl", "reference.jsonl") for row in lines(name)}
    right: dict[bool, list[bool]] = {True: [], False: []}
    for line in (folders["evaluate.bundle"] / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        right[row["reference"] in seen].append(row["prediction"] == row["reference"])
    for known, verdicts in right.items():
        what = "stands" if known else "does not stand"
        share = sum(verdicts) / max(1, len(verdicts))
        print(f"exact text of the bundle where the call {what} in the pool: {share:.1%} of {len(verdicts)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of a finished quickstart")
    folders, _ = newest(parser.parse_args().store)
    found(folders)
    unseen(folders)


if __name__ == "__main__":
    main()
