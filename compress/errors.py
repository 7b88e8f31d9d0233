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

Every message says where, what was got, what is allowed and what to do. This module imports nothing.
"""

from __future__ import annotations


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
        super().__init__(text)

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
