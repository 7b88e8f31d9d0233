"""``python -m compress``: the command ``edgestill``."""

from __future__ import annotations

from compress.entry import main

if __name__ == "__main__":
    main()
