"""edgestill's core: a profile in, proven artifacts out. ``from compress import load_profile, run``.

Importing this package loads neither torch nor pydantic, nor anything else; the two names load on first use.
"""

from __future__ import annotations

from compress.version import __version__

TYPE_CHECKING = False  # typing's own takes as long to import as all else that the command does before Ctrl-C is safe
if TYPE_CHECKING:
    from typing import Any

    from compress.pipeline import run as run
    from compress.profile import load_profile as load_profile

__all__ = ["__version__", "load_profile", "run"]


def __getattr__(name: str) -> Any:
    if name == "load_profile":
        from compress.profile import load_profile

        return load_profile
    if name == "run":
        from compress.pipeline import run

        return run
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
