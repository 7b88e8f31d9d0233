"""The address of an endpoint, ``http(s)://HOST/v1#MODEL``, and its key: checked before anything is planned or sent.

`is_address` tells an address from a path, `parse_address` takes it apart, `read_key` reads the key. An address with a
password or a query is refused, and no message shows it: it would stand in records and keys. Loads no network code.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import SplitResult, urlsplit

from compress.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
EXAMPLE = "a URL such as http://localhost:8000/v1#MODEL"
LONGEST = 2048  # characters of a URL
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def is_address(spec: str) -> bool:
    """Whether ``spec`` begins like a URL; one slash is enough, since a Path merges two."""
    return _SCHEME.match(spec) is not None


def parse_address(spec: str, where: str = "teacher") -> tuple[str, str]:
    """URL and model of ``URL#MODEL``; the key is checked too.

    Raises:
        UserError: it is none, holds a password or a query, or names no model; the key cannot be sent.
    """
    url, _, model = spec.partition("#")
    scheme, _, rest = url.partition(":")
    url = f"{scheme.lower()}:{rest if rest.startswith('//') else '/' + rest}"  # a Path has merged two slashes
    check_url(url, where)
    check_model(model, where)
    read_key(where=where)
    return url, model


def check_url(url: str, where: str = "teacher") -> None:
    """Refuse what is no address of a server, saying which part of it is wrong.

    Raises:
        UserError: as `parse_address`.
    """
    if "@" in url or "?" in url or "\\" in url:  # told without a word of it
        what = "password" if "@" in url else "query" if "?" in url else "backslash"
        raise UserError(
            where, f"the endpoint's URL holds a {what}", EXAMPLE, f"Put the key into the variable {KEY_VARIABLE}"
        )
    wrong = next((sign for sign in url if not "!" <= sign <= "~"), None)
    if wrong is not None:
        got = f"the endpoint's URL holds the character {wrong!r}"
        do = "Write the host as its xn-- form, and other characters of the path as %XX"
        raise UserError(where, got, "letters, digits and signs of ASCII", do)
    if len(url) > LONGEST:
        raise UserError(where, f"the endpoint's URL has {len(url)} characters", f"at most {LONGEST}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text may show what stands between the colons, which may be half of a password
        raise UserError(where, "the endpoint's URL has a broken host or port", EXAMPLE) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(where, f"the endpoint is {url!r}", EXAMPLE)
    if port == 0:
        raise UserError(where, "the endpoint's port is 0", "1 to 65535")
    _check_host(parts, where)


def _check_host(parts: SplitResult, where: str) -> None:
    host = parts.hostname or ""
    if "[" in parts.netloc:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise UserError(where, f"the endpoint's host is {host!r}", "an IPv6 address in brackets") from None
        return
    labels = host.removesuffix(".").split(".")
    wrong = [label for label in labels if not _LABEL.fullmatch(label)]
    if wrong or len(host) > 253:
        got = f"the endpoint's host has the part {wrong[0][:80]!r}" if wrong else "the endpoint's host is too long"
        allowed = "parts of 1 to 63 letters, digits and dashes between dots, 253 characters in all"
        raise UserError(where, got, allowed)


def check_model(model: str, where: str = "teacher") -> None:
    """Refuse a model name that is none.

    Raises:
        UserError: it is absent, too long, or holds a control character or a second ``#``.
    """
    if not model.strip():
        raise UserError(where, "the endpoint names no model", "URL#MODEL, such as http://localhost:8000/v1#llama")
    if "#" in model or "://" in model:  # told without a word of it: it may be the end of a password with a # in it
        raise UserError(where, "the endpoint's model name holds # or ://", "URL#MODEL with one #")
    if model != model.strip() or not model.isprintable() or len(model) > 256:
        allowed = "a name of up to 256 printable characters without blanks around it"
        raise UserError(where, f"the endpoint's model is {model[:80]!r}", allowed)


def read_key(variable: str = KEY_VARIABLE, where: str = "teacher") -> str:
    """The key of the environment ``variable`` without blanks around it; empty where there is none.

    Raises:
        UserError: it holds a character that no HTTP header can carry; the message does not show the key.
    """
    key = os.environ.get(variable, "").strip()
    for at, sign in enumerate(key, start=1):
        if not "!" <= sign <= "~" or (sign in "\"'" and at in (1, len(key))):
            odd = "a blank" if sign.isspace() else "no printable ASCII character"
            what = "a quotation mark" if sign in "\"'" else odd
            raise UserError(
                f"{where}: variable {variable}",
                f"character {at} of the key's {len(key)} is {what}",
                "the key alone, as the provider shows it",
                f"Set {variable} anew, without quotation marks and line breaks",
            )
    return key
