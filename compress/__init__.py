"""edgestill's core: a profile in, proven artifacts out. ``from compress import load_profile, run``.

Importing this package loads neither torch nor pydantic, nor anything else; the two names load on first use. It switches
off the telemetry of the libraries that edgestill uses, in this process and all that it starts, before any is loaded;
who sets one of `TELEMETRY` to another value gets that value.
"""

from __future__ import annotations

import os

from compress.version import __version__

TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime and onnxruntime-genai
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface-hub, and transformers, datasets, accelerate and optimum through it
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _off in TELEMETRY.items():
    if not os.environ.get(_name):
        os.environ[_name] = _off

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
