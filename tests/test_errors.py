"""Errors: the message's four parts, exit codes, and the trip between processes."""

import pickle

import pytest

from compress.errors import DataError, EdgestillError, GateFailed, MissingExtraError, UserError, hide_secrets, printable


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


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("line\nnext\ttab", "line\nnext\ttab"),
        ("\r\x9b2Kgone \x85 \x7f", "\\x0d\\x9b2Kgone \\x85 \\x7f"),
        ("abc\u202edcba\u2066 \u2028 \ud800", "abc\\u202edcba\\u2066 \\u2028 \\ud800"),
        ("Grüße, 你好, مرحبا, 👩\u200d🚀", "Grüße, 你好, مرحبا, 👩\u200d🚀"),
    ],
)
def test_control_characters_are_written_out(raw, shown):
    assert printable(raw) == shown
    assert printable(shown) == shown
    assert str(EdgestillError("server", raw)) == f"server: {shown}"
    str(EdgestillError("server", raw)).encode()


@pytest.mark.parametrize(
    "text",
    [
        "the key {} is wrong",
        "Authorization: Bearer {}",
        "https://host/v1?api_key={}&x=1 is no address",
        "http://user:{}@host/v1: no such folder",
        "http:/user:{}@host/v1: a Path has merged the slashes",
        "ssh://me:{}@host",
        'it said {{"key": "{}"}}',
    ],
)
def test_secrets_stay_out_of_messages(text, monkeypatch):
    secret = "sk-proj-0123456789abcdefghij"
    assert secret not in str(UserError("teacher", text.format(secret)))
    monkeypatch.setenv("SOME_API_KEY", "  pass+word/with=signs\n")
    for form in ("pass+word/with=signs", "pass%2Bword%2Fwith%3Dsigns"):
        assert form not in str(UserError("teacher", text.format(form)))


@pytest.mark.parametrize(
    "text",
    ["ssh://pi@host:22 is not known", "http://h/v1#@cf/meta/llama", "owner/name@main", "Basic tests pass", "hf_rows"],
)
def test_what_is_no_secret_is_shown(text, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert hide_secrets(f"none: {text}") == f"none: {text}"


def test_adding_keeps_kind_and_facts():
    error = DataError("a", "b", "c", "Do this.")
    error.code = 402
    found = error.adding("And that")
    assert (type(found), str(found), vars(found)["code"]) == (DataError, "a: b; expected c. Do this. And that", 402)
    assert str(DataError("a", "b").adding("Do")) == "a: b. Do"
