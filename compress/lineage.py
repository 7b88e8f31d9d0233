"""What led to an artifact: every step before it, with parameters and figures, and what came in from outside.

`lineage` of a plan's node is handed to the stage that makes it, and the export writes it into ``bundle.json``. It holds
what the node's key is made of, and the figures that checkpoints carry in themselves: no times, no paths, the same
each time. What else a run measured stands in its record (`compress.shipping`). Where the origin states no licence, "not
stated" stands. Knows no stage by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.files import licence_of
from compress.json_reader import read_table
from compress.plans import Node, Outside, Plan, named_teachers

CARRIED = "edgestill.json"  # what a checkpoint says of the step that made it
FIGURES = ("training", "figures")  # its tables of figures


def figures_of(folder: Path) -> dict[str, Any]:
    """The single figures that the checkpoint in ``folder`` carries; empty for an artifact that carries none."""
    path = folder / CARRIED
    if not path.is_file():
        return {}
    told = read_table(path, ModelError)
    tables = [told, *(told[name] for name in FIGURES if isinstance(told.get(name), dict))]
    return {name: value for table in tables for name, value in table.items() if isinstance(value, int | float)}


def lineage(planned: Plan, node: Node, folders: Mapping[str, Path]) -> dict[str, Any]:
    """``{"steps": [...], "origins": [...]}`` of everything that ``node`` follows from, in the order of the plan.

    Args:
        folders: where the artifact of each step before it stands, by its key.
    """
    before = {found.key for found in _ancestors(node)}
    steps = [one for one in planned.nodes if one.key in before]
    return {
        "steps": [{**one.facts, "id": one.key, "figures": figures_of(folders[one.key])} for one in steps],
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
        outside |= {f"teacher {name}": planned.facts.teachers[name] for name in named_teachers(node.params)}
        for slot, source in outside.items():
            # the name of a run's source is "data.source.read of pool"; of a file, its name is part of its digest
            role = node.name.rpartition(" of ")[2] if slot == "source" else slot
            name = source.path.name if slot == "source" and source.path.is_file() else None
            found[role, source.key] = {
                "role": role, "identity": source.key, "name": name, "licence": licence_of(source.path)
            }  # fmt: skip
    return list(found.values())
