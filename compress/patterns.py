"""Regular expressions that came from outside: refused where matching them may take for ever.

Python's engine tries every way to match. A repeated group that itself holds a choice, as in ``(a+)+b`` or ``(a|a)*b``,
has twice as many ways with each letter more, and nothing can stop it once it runs. `slow_pattern` says why an
expression is not taken.
"""

from __future__ import annotations

import re

MAX_LENGTH = 20_000  # characters; one that names the parts of 100 layers has 2,000
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[a-zA-Z<>=!:#-]*|[()|*+?]|\{\d*,?\d*\}", re.DOTALL)


def slow_pattern(pattern: str, *, repeats: int) -> str:
    """The reason against an expression from outside; "" where it is taken: it compiles and its time is bounded.

    ``repeats`` is how many open-ended repetitions it may hold: each may multiply the time by the length of the text.
    """
    if len(pattern) > MAX_LENGTH:
        return f"has {len(pattern)} characters, more than {MAX_LENGTH}"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    found = 0
    groups: list[bool] = [False]  # of each open group: does it hold a choice?
    closed = False  # of the group that ended just before
    for part in _PARTS.findall(pattern):
        if part.startswith("("):
            groups.append(False)
        elif part == ")":
            closed = groups.pop() if len(groups) > 1 else False
            groups[-1] = groups[-1] or closed
            continue
        elif part in ("*", "+") or part.startswith("{"):
            if closed:
                return "repeats a group that holds a choice or a repetition, which can take for ever"
            found += part in ("*", "+") or "," in part
            groups[-1] = groups[-1] or part in ("*", "+") or "," in part
        elif part in ("|", "?"):
            groups[-1] = True
        closed = False
    return f"has {found} open-ended repetitions, more than {repeats}" if found > repeats else ""
