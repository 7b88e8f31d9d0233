"""Errors: the message's four parts, exit codes, and the trip between processes."""

import pickle

import pytest

from compress.errors import DataError, EdgestillError, GateFailed, MissingExtraError


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (EdgestillError("here", "broke"), "here: broke", 1),
        (DataError("a.jsonl:3", "got 1", "an object", "Mend it."), "a.jsonl:3: got 1; expected an object. Mend it.", 2),
        (GateFailed("gate", "no"), "gate: no", 3),
        (MissingExtraError("ray", "ray", "backend: ray"), "backend: ray: the package 'ray' is not installed. "
         "Install it with: pip install 'edgestill[ray]'", 2),
    ],
)  # fmt: skip
def test_message_code_and_round_trip(error, message, code):
    assert (str(error), error.exit_code) == (message, code)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.where, again.do) == (message, error.where, error.do)
