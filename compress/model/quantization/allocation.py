"""Which bits for which part of a model under a budget of bytes: the multiple-choice knapsack, solved exactly.

`frontier` gives every allocation that no other beats in bytes and cost at once, `within` the best one under a budget.
Costs add up over parts: divergences of small, unrelated errors do so to first order. Plain Python; knows nothing of
models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from compress.errors import ModelError


class Option(NamedTuple):
    """One way to store a part: how much it takes, and what it costs in quality."""

    name: str
    size: int
    cost: float


class Allocation(NamedTuple):
    """One option for every part, with the sums."""

    size: int
    cost: float
    chosen: Mapping[str, str]  # part -> name of the option


class _Node(NamedTuple):
    """A partial allocation; its choices are read off along ``before``."""

    size: int
    cost: float
    option: str
    before: _Node | None


def frontier(parts: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """Return the Pareto frontier of all allocations, smallest first; exact.

    Parts are added one by one, and of the partial allocations only those are kept that no other beats: a worse one
    cannot become part of a best whole (Nemhauser and Ullmann, "Discrete dynamic programming and capital allocation",
    1969). Parts of few different sizes give few sums, so that the list stays short.
    """
    nodes = [_Node(0, 0.0, "", None)]
    for options in parts.values():
        grown = [
            _Node(node.size + option.size, node.cost + option.cost, option.name, node)
            for node in nodes
            for option in options
        ]
        grown.sort(key=lambda node: (node.size, node.cost))
        nodes, best = [], float("inf")
        for node in grown:
            if node.cost < best:
                nodes.append(node)
                best = node.cost
    return [_read(node, list(parts)) for node in nodes]


def _read(node: _Node, names: Sequence[str]) -> Allocation:
    chosen: dict[str, str] = {}
    at: _Node | None = node
    for name in reversed(names):
        assert at is not None, "one node per part"
        chosen[name] = at.option
        at = at.before
    return Allocation(node.size, node.cost, dict(reversed(chosen.items())))


def within(found: Sequence[Allocation], budget: int, *, where: str) -> Allocation:
    """Return the allocation of least cost that takes at most ``budget``; ModelError when the smallest exceeds it."""
    fitting = [allocation for allocation in found if allocation.size <= budget]
    if not fitting:
        raise ModelError(
            where,
            f"a budget of {budget:,} bytes for the linears",
            f"at least {found[0].size:,}, what the smallest options take",
            "Raise the budget, allow fewer bits, or prune before",
        )
    return fitting[-1]
