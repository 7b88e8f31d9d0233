"""Scores of generated text against a reference, one value per row.

`score_calls` is for answers that are one function call in JSON (``{"name": ..., "args": {...}}``), `parse_call` reads
one. Per-row arrays come back, never a mean, so that two models can be compared row by row (`bootstrap`). Knows
nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FunctionTable = Mapping[str, Sequence[str]]  # name of a function -> names of its arguments
CALL_METRICS = ("exact_match", "function_accuracy", "argument_f1", "valid_json")
MAX_DEPTH = 100  # of the arguments of a call


def no_constant(text: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON forbids."""
    raise ValueError(f"{text} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that gives a key twice: readers disagree on which one counts."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def nested_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects stand in one another more than ``most`` levels deep: writing such a value may fail."""
    level = [value]
    for _ in range(most + 1):
        outer = [one for one in level if isinstance(one, dict | list)]
        level = [inner for one in outer for inner in (one.values() if isinstance(one, dict) else one)]
        if not outer:
            return False
    return True


def parse_call(text: str) -> dict[str, Any] | None:
    """The call as ``{"name": str, "args": dict}``, or None when ``text`` is not exactly one call."""
    try:
        call = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or set(call) - {"name", "args"}:
        return None
    if nested_deeper(call, MAX_DEPTH):
        return None
    args = call.get("args", {})
    return {"name": call["name"], "args": args} if isinstance(args, dict) else None


def typed(value: Any) -> str:
    """A value with its JSON type, so that 1, 1.5, "1" and true stay apart; 1 and 1.0 are the same number."""
    if isinstance(value, float) and value.is_integer() and math.isfinite(value):
        value = int(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def argument_f1(predicted: dict[str, Any], wanted: dict[str, Any]) -> float:
    """F1 over (name, value) pairs; two calls without arguments agree fully."""
    if not predicted and not wanted:
        return 1.0
    hits = sum(1 for key, value in predicted.items() if key in wanted and typed(value) == typed(wanted[key]))
    return 2 * hits / (len(predicted) + len(wanted))


def functions_in(answers: Iterable[str]) -> dict[str, list[str]]:
    """The functions that ``answers`` call, with the arguments that they give; empty where fewer than half are calls."""
    calls = [parse_call(answer) for answer in answers]
    found: dict[str, set[str]] = {}
    for call in calls:
        if call is not None:
            found.setdefault(call["name"], set()).update(call["args"])
    if 2 * sum(call is not None for call in calls) < len(calls):
        return {}
    return {name: sorted(arguments) for name, arguments in sorted(found.items())}


def unknown_function(answer: str, known: Collection[str]) -> str | None:
    """The name that a call gives, where no function of ``known`` has it; None for other answers."""
    call = parse_call(answer)
    return None if call is None or call["name"] in known else str(call["name"])


def score_calls(predictions: Sequence[str], references: Sequence[str], known: Collection[str] = ()) -> dict[str, Array]:
    """Score predicted calls, each metric an array (rows,) with values in 0..1.

    With ``known`` names also ``unknown_function_rate``: 1 for a call of a function that is not among them, nor called
    by a reference: nothing can serve it.

    ``exact_match``: same name and the same arguments with the same types, in any order.
    ``function_accuracy``: same name. ``argument_f1``: 0 where the name is wrong. ``valid_json``: it parses as
    one call. Raises ValueError when the lengths differ or a *reference* is no call.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    scores: dict[str, Array] = {name: np.zeros(len(references)) for name in CALL_METRICS}
    if known:
        names = {*known, *functions_in(references)}
        strange = [unknown_function(predicted, names) is not None for predicted in predictions]
        scores["unknown_function_rate"] = np.array(strange, dtype=np.float64)
    for i, (predicted, reference) in enumerate(zip(predictions, references, strict=True)):
        wanted = parse_call(reference)
        if wanted is None:
            raise ValueError(f"reference {i} is not a call: {reference[:80]!r}")
        call = parse_call(predicted)
        if call is None:
            continue
        scores["valid_json"][i] = 1.0
        if call["name"] == wanted["name"]:
            scores["function_accuracy"][i] = 1.0
            scores["argument_f1"][i] = argument_f1(call["args"], wanted["args"])
            scores["exact_match"][i] = float(same_args(call["args"], wanted["args"]))
    return scores


def same_args(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether both hold the same argument names with equal typed values."""
    return left.keys() == right.keys() and all(typed(left[k]) == typed(right[k]) for k in left)
