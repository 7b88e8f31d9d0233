"""The error family: one root, few kinds, each with the exit code of the command line.

    EdgestillError        1  the work failed
    ├── UserError         2  the user's input is wrong
    │   ├── ProfileError     profile file or --set
    │   ├── DataError        rows: missing, malformed, empty
    │   ├── ModelError       checkpoint, tokenizer, architecture
    │   ├── TargetError      device: unknown, or the bundle does not fit
    │   └── MissingExtraError  an optional package is not installed
    ├── GateFailed        3  the quality gate said no
    ├── StoreError        1  disk full, no permission, damaged artifact
    ├── ParityError       1  an export differs from the model it came from
    └── TrainingError     1  loss is NaN, diverged

Every message says where, what was got, what is allowed and what to do. What comes from servers, devices and files may
stand in it: `safe_to_show` makes any text fit for a screen, a log and a record. This module imports nothing of ours.
"""

from __future__ import annotations

import os
import re

# C0 and C1 controls but for line feed and tab; marks that turn the direction of writing; line ends that only some know;
# halves of surrogate pairs, which no stream can write
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_SECRET_NAME = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)\Z", re.IGNORECASE)
_SHORTEST_SECRET = 6  # shorter values are words such as "EMPTY", which local servers are given as a key
_SECRET_PATTERNS = (
    (re.compile(r"\b(https?:[/\\]+)[^\s/\\?#]*@", re.IGNORECASE), r"\1***@"),  # user:password@ of an address
    (re.compile(r"\b([a-z][a-z0-9+.-]*://[^\s/\\?#@:]*:)[^\s/\\?#]*@", re.IGNORECASE), r"\1***@"),
    (re.compile(r"\b(Bearer|Basic)(\s+)(?=\S*\d|\S{16})\S+", re.IGNORECASE), r"\1\2***"),
    (
        re.compile(
            r"([?&](?:[\w-]*(?:key|token|secret|password|passwd|signature)|auth|pw|pwd|sig)=)[^&\s#\"']+", re.IGNORECASE
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:sk|pk|rk|gsk|hf|xai|gh[oprsu])[-_](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{12,}"), "***"),
)


def printable(text: str) -> str:
    """``text`` with control characters written as ``\\x1b`` or ``\\u202e``, so that no terminal obeys them.

    Line feeds and tabs stay, as do all letters of all scripts.
    """

    def written(found: re.Match[str]) -> str:
        number = ord(found[0])
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

    return _UNPRINTABLE.sub(written, text)


def hide_secrets(text: str) -> str:
    """``text`` with ``***`` for passwords in addresses, what looks like a key, and the secrets of the environment.

    The last are the values of variables that are called like a key, token, secret or password, as they are or as a URL
    or JSON writes them.
    """
    for secret in _environment_secrets():
        if secret in text:
            text = text.replace(secret, "***")
    for pattern, instead in _SECRET_PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _environment_secrets() -> list[str]:
    """The longest first, since one may be part of another."""
    from urllib.parse import quote  # loads when the first error is made

    found = set()
    for name, value in os.environ.items():
        for line in value.splitlines() if _SECRET_NAME.search(name) else ():
            plain = line.strip()
            if len(plain) >= _SHORTEST_SECRET:
                escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
                found |= {plain, escaped, quote(plain, safe="", errors="replace")}
    return sorted(found, key=len, reverse=True)


def safe_to_show(text: str) -> str:
    """``text`` without secrets and control characters: what every message, progress line and record goes through."""
    return printable(hide_secrets(text))


class EdgestillError(Exception):
    """Root of all errors that edgestill raises on purpose; printed as one message, never as a traceback.

    ``where`` is a file, ``file:line`` or dotted key; ``got`` what was found there; ``allowed`` what is
    accepted; ``do`` the next step for the user. ``got`` alone is enough when the rest says nothing.
    """

    exit_code = 1

    def __init__(self, where: str, got: str, allowed: str = "", do: str = "") -> None:
        self.where, self.got, self.allowed, self.do = where, got, allowed, do
        text = f"{where}: {got}"
        if allowed:
            text += f"; expected {allowed}"
        if do:
            text += f". {do}"
        super().__init__(safe_to_show(text))

    def adding(self, do: str) -> EdgestillError:
        """The same error with one more sentence on what to do, for a caller that knows more than who raised it."""
        more = f"{self.do.rstrip('.')}. {do}" if self.do else do
        error = _rebuilt(type(self), self.where, self.got, self.allowed, more)
        error.__dict__.update({name: value for name, value in vars(self).items() if name not in vars(error)})
        return error

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when an error crosses from a worker process."""
        return _rebuilt, (type(self), self.where, self.got, self.allowed, self.do)


def _rebuilt(kind: type[EdgestillError], where: str, got: str, allowed: str, do: str) -> EdgestillError:
    error = kind.__new__(kind)
    EdgestillError.__init__(error, where, got, allowed, do)
    return error


class UserError(EdgestillError):
    """The user's input is wrong."""

    exit_code = 2


class ProfileError(UserError):
    """A profile file, a step file or a --set override is wrong."""


class DataError(UserError):
    """Rows are missing, malformed, of the wrong columns, or none is left."""


class ModelError(UserError):
    """A checkpoint cannot be used: format, architecture, tokenizer, values."""


class TargetError(UserError):
    """A device is unknown, or the bundle does not fit it."""


class MissingExtraError(UserError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            where=needed_for,
            got=f"the package {package!r} is not installed",
            do=f"Install it with: pip install 'edgestill[{extra}]'",
        )


class GateFailed(EdgestillError):
    """The shipped artifact is worse than the profile allows."""

    exit_code = 3


class StoreError(EdgestillError):
    """The artifact store cannot be written or is damaged."""


class ParityError(EdgestillError):
    """An exported model does not compute what its source computes."""


class TrainingError(EdgestillError):
    """Training diverged."""
