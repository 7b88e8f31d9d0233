"""Places of a benchmark: what is taken, and what must never reach a command line or a log."""

from __future__ import annotations

import pytest

from compress.errors import TargetError
from deploy.remote.places import Place, parse_place
from deploy.remote.transport import words


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("local", Place("local")),
        ("ssh://pi@raspberrypi.local", Place("ssh", user="pi", host="raspberrypi.local")),
        ("ssh://pi@10.0.0.7:2222", Place("ssh", user="pi", host="10.0.0.7", port=2222)),
        ("ssh://board", Place("ssh", host="board")),
        ("ssh://a.b-c_d@[fe80::1]:22", Place("ssh", user="a.b-c_d", host="fe80::1", port=22)),
        ("adb://R58M123ABC", Place("adb", serial="R58M123ABC")),
        ("adb://emulator-5554", Place("adb", serial="emulator-5554")),
        ("adb://192.168.1.5:5555", Place("adb", serial="192.168.1.5:5555")),
    ],
)
def test_places_are_read_and_written(text: str, place: Place) -> None:
    assert parse_place(text) == place
    assert parse_place(place.text) == place


@pytest.mark.parametrize(
    "text",
    [
        "", "remote", "ssh://", "ssh://@host", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://a@-host",
        "ssh://a b@h",
        "ssh://a@host/etc", "ssh://a@host:", "ssh://a@host:x", "ssh://a@host:123456", "ssh://a@h;reboot", "ssh://a@h\n",
        "ssh://a@$(x)", "ssh://a@h`x`", "adb://", "adb://-d", "adb://a b", "adb://a;b", "adb://a/b", "http://host",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"--on: got .*; expected local, ssh://user@host") as caught:
        parse_place(text)
    assert caught.value.exit_code == 2


def test_a_port_out_of_range_is_refused() -> None:
    for port in (0, 65536):
        with pytest.raises(TargetError, match=rf"port {port}; expected 1 to 65535"):
            parse_place(f"ssh://pi@host:{port}")


@pytest.mark.parametrize("text", ["ssh://pi:hunter2@host", "ssh://pi:hunter2@host:22", "ssh://pi:hunt@er2@host"])
def test_a_password_is_refused_and_never_shown(text: str) -> None:
    with pytest.raises(TargetError, match="a password stands before the @") as caught:
        parse_place(text)
    assert "hunt" not in str(caught.value)


def test_words_are_quoted_and_only_a_leading_tilde_is_the_home() -> None:
    assert (
        words(["~/a b/python", "-c", "x; rm -rf ~/y", "~", "$HOME"]) == "~/'a b/python' -c 'x; rm -rf ~/y' '~' '$HOME'"
    )
