"""An endpoint's address, its key, its dialect, its replies, and servers that try to harm who asks them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from compress.endpoint import ChatClient, Request
from compress.endpoint_address import is_address, parse_address, read_key
from compress.endpoint_dialects import Dialect, named
from compress.endpoint_replies import Nonsense, Reply, read_reply
from compress.errors import EdgestillError, UserError
from tests.test_teachers import Server, completion, send

SECRET = "sk-THEKEY0123456789"
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    running = []

    def start(behaviour, **options):
        running.append(Server(behaviour))
        settings = {"timeout_s": 5.0, "attempts": 2, "backoff_s": 0.01, **options}
        return ChatClient(running[-1].url, "toy", **settings), running[-1]

    yield start
    for server in running:
        server.close()


# ---------------------------------------------------------------------------------- address and key


@pytest.mark.parametrize(
    "spec",
    [
        "http://me:SECRETPW@host/v1#m",
        "http://SECRETPW@host/v1#m",
        "http:/me:SECRETPW@host/v1#m",
        "HTTP://me:SECRETPW@h#m",
        "https://host/v1?api_key=SECRETPW#m",
        "http://me:SECRETPW/x@host/v1#m",
        "http://me:SECRETPW#x@host/v1#m",
        "http://me:12#SECRETPW@host/v1#m",
        "http://me:SECRETPW\n@host/v1#m",
        "ftp://me:SECRETPW@host/v1#m",
        "http:\\\\me:SECRETPW@host#m",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_shown(spec):
    assert is_address(spec)
    with pytest.raises(UserError) as caught:
        parse_address(spec)
    assert "SECRETPW" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "http://" + "a" * 70 + "/v1#m",
        "http://[::1/v1#m",
        "http://[zz]/v1#m",
        "http://127.0.0.1:9/ü#m",
        "http://bücher.de/#m",
        "http://h:99999/v1#m",
        "http://h:x/v1#m",
        "http://h:0/v1#m",
        "http:///v1#m",
        "http://a..b/v1#m",
        "http://a b/v1#m",
        "http://h/v1",
        "http://h/v1#",
        "http://h/v1# m",
        "http://h/v1#m\x1b[2J",
        "http://h\x00/#m",
        "file:///etc/passwd#m",
        "http://" + "a." * 130 + "b/#m",
        "http://h/" + "a" * 3000 + "#m",
        "http://h/v1#" + "m" * 300,
        "http://h/\udcff#m",
    ],
)
def test_addresses_that_cannot_work_are_refused(spec):
    with pytest.raises(UserError) as caught:
        parse_address(spec)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("http://localhost:8000/v1#llama", ("http://localhost:8000/v1", "llama")),
        ("http:/localhost/v1#a", ("http://localhost/v1", "a")),
        ("HTTPS://Host.example./v1#@cf/meta/llama-3:8b", ("https://Host.example./v1", "@cf/meta/llama-3:8b")),
        ("http://[::1]:8000/v1#m", ("http://[::1]:8000/v1", "m")),
        ("http://xn--bcher-kva.de/%C3%BC#模型", ("http://xn--bcher-kva.de/%C3%BC", "模型")),
    ],
)
def test_addresses(spec, found):
    assert parse_address(spec) == found


@pytest.mark.parametrize("spec", ["models/a", "owner/name", "/abs:x/y", "C:/models", "replies.jsonl", "a:b"])
def test_paths_are_no_addresses(spec):
    assert not is_address(spec)


def test_the_key_is_sent_stripped_and_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\r\n")
    assert read_key() == SECRET
    for wrong in (
        f'"{SECRET}"',
        f"{SECRET}\nx",
        f"{SECRET} x",
        SECRET + "ü",
        f"\x1b{SECRET}",
        f"a\0{SECRET}".replace("\0", "\x01"),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
            ChatClient("http://localhost/v1", "m")
        assert SECRET not in str(caught.value)


# ---------------------------------------------------------------------------------- replies


def chat(message, why="stop", tokens=None, **more):
    choice = {"message": message, "finish_reason": why}
    if tokens is not None:
        choice["logprobs"] = {"content": [{"token": text, "logprob": value} for text, value in tokens]}
    return json.dumps({"choices": [choice], **more}).encode()


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ({"content": "<think>hm</think>\nyes"}, ("yes", True, True)),
        ({"content": "yes", "reasoning_content": "hm"}, ("yes", True, True)),
        ({"content": "yes", "reasoning": "hm", "refusal": None}, ("yes", True, True)),
        ({"content": None, "reasoning_content": "hm"}, ("", False, True)),
        ({"content": "", "reasoning": "hm"}, ("", False, True)),
        ({"reasoning_content": "hm"}, ("", False, True)),
        ({"content": "yes", "reasoning_content": None, "tool_calls": []}, ("yes", True, False)),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]}, ("yes", True, True)),
        ({"content": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]}, ("yes", True, False)),
        ({"content": "<think>hm"}, ("", False, True)),
        ({"content": "half \ud83d"}, ("half \ufffd", True, False)),
        ({"content": None}, ("", True, False)),
    ],
)
def test_answers_without_thoughts(message, reply):
    found = read_reply(chat(message), 10)
    assert (found.text, found.finished, found.thoughts) == reply
    found.text.encode()


@pytest.mark.parametrize("message", [{"content": 5}, {}, [], {"content": [{"type": "image_url"}]}, {"content": [5]}])
def test_messages_that_are_none(message):
    with pytest.raises(Nonsense, match="not a chat completion"):
        read_reply(chat(message), 10)


@pytest.mark.parametrize(
    ("why", "used", "finished"),
    [
        ("stop", None, True),
        ("eos", None, True),
        ("eos_token", None, True),
        ("end_turn", None, True),
        ("STOP", None, True),
        ("length", 3, False),
        ("max_tokens", None, False),
        ("content_filter", 3, False),
        ("tool_calls", 3, False),
        ("error", 3, False),
        (None, None, False),
        (None, 3, True),
        ("", 10, False),
        (7, 12, False),
    ],
)
def test_reasons_to_stop(why, used, finished):
    assert read_reply(chat({"content": "yes"}, why, usage={"completion_tokens": used}), 10).finished is finished


@pytest.mark.parametrize(
    ("content", "tokens", "mean"),
    [
        ("yes no", [("yes", -1.0), (" no", -3.0)], -2.0),
        ("yes no", [("x", -1.0), ("?", -3.0)], -2.0),  # no thoughts: all tokens are the answer's, however written
        ("<think>hm</think>yes no", [("<think>hm", -9.0), ("</think>", -9.0), ("yes", -1.0), (" no", -3.0)], -2.0),
        ("<think>hm</think>yes", [("<think>hm</think>", -9.0), ("yes", -1.0), ("<|im_end|>", -3.0)], -2.0),
        (
            "<think>hm</think>\n\nyes\n",
            [("<think>hm</think>", -9.0), ("\n\n", -9.0), ("yes", -1.0), ("\n", -3.0)],
            -2.0,
        ),
        ("<think>hm</think>yes", [("x", -1.0), ("x", -3.0)], math.nan),
        ("<think>hm</think>yes", None, math.nan),
        ("<think>hm", [("<think>hm", -1.0)], math.nan),
    ],
)
def test_confidence_is_that_of_the_answer_alone(content, tokens, mean):
    assert read_reply(chat({"content": content}, tokens=tokens), 10).mean_logprob == pytest.approx(mean, nan_ok=True)


# ---------------------------------------------------------------------------------- dialects

SENT = {"model": "m", "messages": [], "max_tokens": 9, "temperature": 0.0, "seed": 0, "logprobs": True, "top_p": 0.5}


@pytest.mark.parametrize(
    ("told", "first"),
    [
        (
            {
                "error": {
                    "message": "Unsupported parameter: 'max_tokens' is not supported with this "
                    "model. Use 'max_completion_tokens' instead.",
                    "param": "max_tokens",
                    "code": "unsupported_parameter",
                }
            },
            "max_tokens",
        ),
        (
            {
                "error": {
                    "message": "Unsupported value: 'temperature' does not support 0.0 with this model. Only the "
                    "default (1) value is supported.",
                    "param": "temperature",
                    "code": "unsupported_value",
                }
            },
            "temperature",
        ),
        ({"error": {"message": "Unrecognized request argument supplied: seed", "param": None}}, "seed"),
        (
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
            "seed",
        ),
        (
            {
                "object": "error",
                "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not "
                "permitted', 'input': 'logprobs'}]",
                "code": 400,
            },
            "seed",
        ),
        (
            {
                "object": "error",
                "message": {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "logprobs"],
                            "msg": "Extra inputs are not permitted",
                            "input": "seed unknown",
                        }
                    ]
                },
            },
            "logprobs",
        ),
        ({"error": {"message": "property 'logprobs' is unsupported, did you mean 'stop'?"}}, "logprobs"),
        ({"error": "logprobs are not enabled for this model"}, "logprobs"),
        ({"error": {"message": "This model does not support log probabilities."}}, "logprobs"),
        (
            {
                "error": {
                    "code": 400,
                    "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
                }
            },
            "seed",
        ),
        ({"error": "unknown field `seed`, expected one of `model`, `messages`, `max_tokens`, `temperature`"}, "seed"),
        ({"message": "Additional properties are not allowed ('seed' was unexpected)"}, "seed"),
        ({"message": '"seed" is not allowed'}, "seed"),
        ({"issues": [{"code": "unrecognized_keys", "keys": ["seed"], "message": "Unrecognized key(s)"}]}, "seed"),
        ({"error": {"message": "create() got an unexpected keyword argument 'seed'"}}, "seed"),
        ({"type": "error", "error": {"message": "seed: Extra inputs are not permitted"}}, "seed"),
        ({"error": {"message": "temperature and top_p cannot both be specified for this model."}}, "top_p"),
        ({"error": "`temperature` has to be a strictly positive float"}, "temperature"),
        (
            {"detail": [{"type": "missing", "loc": ["body", "max_completion_tokens"], "msg": "Field required"}]},
            "max_tokens",
        ),
        ('json: unknown field "seed"', "seed"),
    ],
)
def test_refusals_of_many_servers_are_understood(told, first):
    body = told.encode() if isinstance(told, str) else json.dumps(told).encode()
    assert named(body, SENT)[:1] == [first]


@pytest.mark.parametrize(
    "told",
    [
        {
            "error": {
                "message": "max_tokens is too large: 9999. This model supports at most 4096.",
                "param": "max_tokens",
            }
        },
        {"error": {"message": "This model's maximum context length is 9 tokens; max_tokens and messages exceed it."}},
        {"error": {"message": "The model `m` does not exist", "code": "model_not_found"}},
        {"error": {"message": "System role not supported"}},
        "<html>Bad Request</html>",
        "",
        "[" * 50_000,
    ],
)
def test_other_refusals_name_no_parameter(told):
    assert named(told.encode() if isinstance(told, str) else json.dumps(told).encode(), SENT) == []


def test_a_dialect_is_learned_once_and_ends():
    dialect = Dialect()
    unknown = b'{"error": {"message": "Unsupported parameter", "param": "%s"}}'
    assert dialect.learn("chat", SENT, unknown % b"max_tokens", ())
    assert dialect.spoken("chat", {"max_tokens": 9}) == {"max_completion_tokens": 9}
    assert dialect.spoken("other", {"max_tokens": 9}) == {"max_tokens": 9}
    assert dialect.learn("chat", SENT, unknown % b"max_tokens", ())  # a request that was under way meanwhile
    again = dialect.spoken("chat", SENT)
    assert not dialect.learn("chat", again, unknown % b"max_completion_tokens", ())
    assert not dialect.learn("chat", again, unknown % b"seed", ()), "what the request needs is not left out"
    assert dialect.learn("chat", again, b"temperature must be strictly positive", ("temperature",))
    assert dialect.spoken("chat", {"temperature": 0.0}) == {"temperature": 0.01}
    assert dialect.spoken("chat", {"temperature": 0.7}) == {"temperature": 0.7}
    assert dialect.notes() == [
        "the server takes max_completion_tokens in place of max_tokens",
        "the server takes no temperature of 0; 0.01 was sent",
    ]


def test_a_server_that_knows_few_parameters_is_spoken_to(serve):
    def strict(handler, body, number):
        for name in ("max_tokens", "seed", "logprobs", "temperature"):
            if name in body:
                error = {"message": f"Unsupported parameter: '{name}'.", "param": name, "code": "unsupported_parameter"}
                return send(handler, json.dumps({"error": error}).encode(), code=400)
        return send(handler, completion("yes"))

    client, server = serve(strict, attempts=1)
    replies = client.complete_all([ASK] * 20, Request(7))
    assert {reply.text for reply in replies} == {"yes"}
    assert server.bodies[-1] == {
        "model": "toy",
        "messages": ASK,
        "max_completion_tokens": 7,
        "path": "/v1/chat/completions",
    }
    assert len(server.bodies) <= 20 + 4 * client.parallel, (
        "each request in flight may learn each once, and no later one"
    )
    assert len(client.dialect.notes()) == 4


def test_errors_inside_of_a_good_reply_are_errors(serve):
    client, server = serve(
        lambda handler, body, number: send(handler, b'{"error": {"code": 402, "message": "no credit"}}')
    )
    with pytest.raises(UserError, match=r"HTTP 402: .*no credit.*Pay"):
        client.complete(ASK, Request(4))
    assert len(server.bodies) == 1


# ---------------------------------------------------------------------------------- harm


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(serve, code):
    _, elsewhere = serve(lambda handler, body, number: send(handler, completion("x")))
    to = f"{elsewhere.url}/chat/completions?token=SECRETPW"
    client, server = serve(lambda handler, body, number: send(handler, b"", code=code, Location=to))
    with pytest.raises(UserError, match=rf"HTTP {code}, it sends on to {elsewhere.url}.*not followed") as caught:
        client.complete(ASK, Request(4))
    assert (len(server.bodies), elsewhere.bodies) == (1, [])
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "SECRETPW" not in str(caught.value)


def test_a_server_that_echoes_the_key_and_colours(serve):
    told = f'{{"error": "key {SECRET} \x1b[31mis\x07 wrong, {"x" * 200}"}}'.encode()
    client, _ = serve(lambda handler, body, number: send(handler, told, code=401))
    with pytest.raises(UserError, match=r"key \*\*\* \\x1b\[31mis\\x07 wrong") as caught:
        client.complete(ASK, Request(4))
    assert caught.value.__cause__ is None
    assert SECRET not in repr(caught.value)


def drip(handler, first, part):
    with suppress(OSError):
        handler.wfile.write(first)
        for _ in range(200):
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("first", "part"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),  # no length: until the connection ends
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"H"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", b" "),
    ],
)
def test_a_reply_that_drips_ends(serve, first, part):
    client, server = serve(
        lambda handler, body, number: drip(handler, first, part), whole_s=0.6, timeout_s=0.5, attempts=2
    )
    started = time.monotonic()
    with pytest.raises(EdgestillError, match=r"not whole after 1 s|HTTP 500|got more than 100 headers"):
        client.complete(ASK, Request(4))
    assert time.monotonic() - started < 8
    assert len(server.bodies) <= 2


def test_endless_headers_and_bodies_end(serve, monkeypatch):
    monkeypatch.setattr("compress.endpoint_transport.MAX_REPLY_BYTES", 1 << 20)

    def flood(handler, body, number):
        with suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" if number == 1 else b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(3000):
                handler.wfile.write(b"X-More: " + b"y" * 1000 + b"\r\n")

    client, _ = serve(flood)
    with pytest.raises(EdgestillError, match="longer than 1 MiB"):
        client.complete(ASK, Request(4))


def test_a_reply_that_is_compressed_unasked_is_named(serve):
    client, server = serve(lambda handler, body, number: send(handler, b"\x1f\x8b123", Content_Encoding="gzip"))
    with pytest.raises(EdgestillError, match=r"compressed \(gzip\)"):
        client.complete(ASK, Request(4))
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_the_limit_on_a_reply_can_be_set(monkeypatch):
    monkeypatch.setenv("EDGESTILL_REPLY_SECONDS", "600")
    client = ChatClient("http://localhost/v1", "m")
    assert (client.timeout_s, client.whole_s) == (600.0, 600.0)
    for wrong in ("0", "nan", "inf", "x", "-5"):
        monkeypatch.setenv("EDGESTILL_REPLY_SECONDS", wrong)
        with pytest.raises(UserError, match="EDGESTILL_REPLY_SECONDS"):
            ChatClient("http://localhost/v1", "m")


# ---------------------------------------------------------------------------------- what was paid for


def test_what_is_in_flight_when_one_fails_is_kept(serve):
    def behaviour(handler, body, number):
        if body["messages"][0]["content"] == "3":
            send(handler, b"no credit", code=402)
        else:
            time.sleep(0.3)
            send(handler, completion("re " + body["messages"][0]["content"]))

    client, server = serve(behaviour, parallel=4)
    kept: dict[int, Reply] = {}
    conversations = [[{"role": "user", "content": str(at)}] for at in range(40)]
    with pytest.raises(UserError, match="HTTP 402"):
        client.complete_all(conversations, Request(4), keep=kept.__setitem__)
    assert {0, 1, 2} <= set(kept)
    assert {at: reply.text for at, reply in kept.items()} == {at: f"re {at}" for at in kept}
    assert len(server.bodies) == len(kept) + 1, "every reply that the server gave is kept"


def test_an_interrupt_keeps_what_is_in_flight_and_asks_no_more(serve, tmp_path):
    begun = threading.Event()

    def behaviour(handler, body, number):
        if number >= 6:
            begun.set()
        time.sleep(0.4 if number >= 5 else 0.0)
        send(handler, completion("b"))

    client, server = serve(behaviour)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "a{n}", "response": "b"}}\n' for n in range(30)))
    command = [sys.executable, "-m", "compress.entry", "step", "data.quality.mislabel", "--in", "rows.jsonl"]
    command += ["--out", "out.jsonl", "--teacher", f"{client.url}#toy"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE)
    try:
        assert begun.wait(60)
        process.send_signal(2)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    asked = len(server.bodies)
    assert asked < 30
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, timeout=120, check=False)
    assert done.returncode == 0
    assert len(server.bodies) == 30, "each row was asked once"
