"""Where a benchmark runs, as text: ``local``, ``ssh://user@host[:port]``, ``adb://serial``.

`parse_place` takes nothing that a command line could mistake for an option or that carries a secret. Opens nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from compress.errors import TargetError

ALLOWED = "local, ssh://user@host, ssh://user@host:port or adb://serial"
_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)
_ADB = re.compile(r"adb://(?P<serial>[A-Za-z0-9][A-Za-z0-9._:-]{0,127})/?")


@dataclass(frozen=True)
class Place:
    """A parsed place; ``text`` is its plain form, without anything secret."""

    kind: Literal["local", "ssh", "adb"]
    user: str | None = None
    host: str = ""
    port: int | None = None
    serial: str = ""

    @property
    def text(self) -> str:
        """The place as it is written."""
        if self.kind == "ssh":
            host = f"[{self.host}]" if ":" in self.host else self.host
            return "ssh://" + (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")
        return f"adb://{self.serial}" if self.kind == "adb" else "local"


def parse_place(text: str) -> Place:
    """Return the place that ``text`` means.

    Raises:
        TargetError: another form, or a password in it, which is not shown again.
    """
    if text == "local":
        return Place("local")
    if text.startswith("ssh://") and ":" in text.removeprefix("ssh://").rpartition("@")[0]:
        do = "Put your key on the device: ssh-copy-id USER@HOST"
        raise TargetError("--on", "a password stands before the @", "ssh://user@host; keys alone are used", do)
    if found := _SSH.fullmatch(text):
        port = None if found["port"] is None else int(found["port"])
        if port is not None and not 1 <= port <= 65535:
            raise TargetError("--on", f"port {port}", "1 to 65535")
        return Place("ssh", user=found["user"], host=found["host"].strip("[]"), port=port)
    if found := _ADB.fullmatch(text):
        return Place("adb", serial=found["serial"])
    raise TargetError("--on", f"got {text!r}", ALLOWED)
