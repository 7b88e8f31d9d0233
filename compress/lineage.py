"""What led to an artifact: every step before it, with parameters and figures, and what came in from outside.

`lineage` of a plan's node is handed to the stage that makes it, and the export writes it into ``bundle.json``. It holds
what the node's key is made of, and figures of stored steps that are the same each time: no times, no paths. Where the
origin states no licence, "not stated" stands. Knows no stage by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compress.files import licence_of
from compress.plans import Node, Outside, Plan

# seconds, rates, memory and where a killed run went on: not the same in every run of the same step
_UNSTEADY = re.compile(r"(^|_)(seconds|s|memory_bytes|resumed_from)$")
_LONGEST = 200  # characters of a text, entries of a table


def steady(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are the same each time the step is run, tables of one level among them; lists are left out."""
    return {name: value for name, value in metrics.items() if not _UNSTEADY.search(name) and _small(value)}


def _small(value: Any) -> bool:
    if isinstance(value, Mapping):
        return len(value) <= _LONGEST and all(isinstance(one, str | int | float) for one in value.values())
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _LONGEST)


def lineage(planned: Plan, node: Node, record: Callable[[str], Mapping[str, Any] | None]) -> dict[str, Any]:
    """``{"steps": [...], "origins": [...]}`` of everything that ``node`` follows from, in the order of the plan.

    Args:
        record: gives what is kept beside an artifact, by its key: ``metrics`` in it.
    """
    before = {found.key for found in _ancestors(node)}
    steps = [one for one in planned.nodes if one.key in before]
    return {
        "steps": [
            {**one.facts, "id": one.key, "figures": steady((record(one.key) or {}).get("metrics", {}))} for one in steps
        ],
        "origins": _origins(planned, [*steps, node]),
    }


def _ancestors(node: Node) -> Iterator[Node]:
    for source in node.inputs.values():
        if isinstance(source, Node):
            yield source
            yield from _ancestors(source)


def _origins(planned: Plan, nodes: list[Node]) -> list[dict[str, Any]]:
    """What comes from outside, each once: its role, digest, file name where rows carry it, and licence."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for node in nodes:
        outside = {slot: source for slot, source in node.inputs.items() if isinstance(source, Outside)}
        teacher = planned.facts.teacher if node.stage.wants_teacher else None
        if teacher is not None:
            outside["teacher"] = teacher
        for slot, source in outside.items():
            # the name of a run's source is "data.source.read of pool"; of a file, its name is part of its digest
            role = node.name.rpartition(" of ")[2] if slot == "source" else slot
            name = source.path.name if slot == "source" and source.path.is_file() else None
            found[role, source.key] = {
                "role": role, "identity": source.key, "name": name, "licence": licence_of(source.path)
            }  # fmt: skip
    return list(found.values())
