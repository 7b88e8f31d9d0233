"""An endpoint as teacher: a real server on loopback that knows a model, and every way in which it may fail."""

from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from compress.encoding import load_tokenizer
from compress.endpoint_logprobs import Place, PromptScorer
from compress.errors import DataError, EdgestillError, UserError
from compress.model.distillation import endpoint_targets as module
from compress.model.distillation.cache import TargetCache, decode
from compress.model.distillation.endpoint_targets import Spelling, coded_places, endpoint_targets
from compress.model.distillation.losses import forward_kl
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.targets import CachedTargets, Codec, OnlineTargets, cache_header, fill_cache
from compress.progress import Progress
from compress.teachers import EndpointTeacher
from tests.tiny import VOCAB, tiny_model, tiny_token_rows, tiny_tokenizer

ROWS = tiny_token_rows(24, tokens=(4, 9, 17))
K = 16


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=5, scale=0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def table():
    return RowTable(ROWS, vocab=VOCAB)


def by_number(model, body, write=None):
    """What vLLM says: one mapping of ids per token of the prompt, the given token always among them."""
    ids = body["prompt"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    listed: list[Any] = [None]

    def beside(token):
        return {} if write is None else {"decoded_token": write(token)}

    for at, token in enumerate(ids[1:]):
        best = logprobs[at].topk(min(body["prompt_logprobs"], 40)).indices.tolist()
        chosen = dict.fromkeys([*best, token])
        listed.append({str(n): {"logprob": float(logprobs[at, n]), **beside(n)} for n in chosen})
    return {"choices": [{"text": "x", "prompt_logprobs": listed}]}


def by_text(model, body, write):
    """What the older form of OpenAI says: parallel lists, with the one generated token behind the prompt."""
    ids = body["prompt"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    told: dict[str, list[Any]] = {"tokens": [write(ids[0])], "token_logprobs": [None], "top_logprobs": [None]}
    for at, token in enumerate([*ids[1:], int(logprobs[-1].argmax())]):
        best = logprobs[at].topk(body["logprobs"]).indices.tolist()
        told["tokens"].append(write(token))
        told["token_logprobs"].append(float(logprobs[at, token]))
        told["top_logprobs"].append({write(n): float(logprobs[at, n]) for n in best})
    return {"choices": [{"text": "x", "logprobs": told}]}


@pytest.fixture
def serve(monkeypatch):
    """Start a server whose replies ``answer(handler, body, number)`` makes: JSON to send, or None when it has sent."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = []

    def start(answer, **options):
        bodies: list[Any] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    bodies.append({**body, "path": self.path})
                    number = len(bodies)
                reply = answer(self, body, number)
                if reply is not None:
                    code, value = reply if isinstance(reply, tuple) else (200, reply)
                    send(self, json.dumps(value).encode(), code)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return EndpointTeacher(url, "toy", **({"timeout_s": 5.0, "attempts": 3, "backoff_s": 0.01} | options)), bodies

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def send(handler, content, code=200):
    try:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
    except (BrokenPipeError, ConnectionResetError):
        pass  # some tests want the client to give up


@pytest.fixture
def ask(tmp_path, context, tokenizer, table):
    def run(teacher, *, rows=table, place="targets", **given):
        params = LogitsParams(**{"top_k": K, **given})
        named, folder = (tokenizer, teacher.identity), tmp_path / place
        return endpoint_targets(teacher, rows, params, named=named, folder=folder, ctx=context())

    return run


def local(tmp_path, model, tokenizer, table, top_k=K):
    """The same cache from the model itself."""
    header = cache_header((tokenizer, "x"), vocab=VOCAB, codec=Codec(top_k=top_k), temperature=1.0)
    cache = TargetCache(tmp_path / "local", header)
    fill_cache(cache, table, OnlineTargets(model, vocab=VOCAB), Progress(quiet=True))
    return CachedTargets(cache, table)


def same(one, other):
    """Whether two top-k targets say the same; equal chances may stand in another order."""
    chances = [torch.zeros(len(t.ids), VOCAB).scatter_(1, t.ids, t.logprobs.exp()) for t in (one, other)]
    torch.testing.assert_close(*chances, rtol=4e-3, atol=1e-4)
    torch.testing.assert_close(one.log_tail.exp(), other.log_tail.exp(), rtol=4e-3, atol=1e-4)


def test_a_server_that_tells_ids_fills_the_cache_of_a_local_teacher(serve, ask, tmp_path, model, tokenizer, table):
    teacher, bodies = serve(lambda handler, body, number: by_number(model, body))
    target_fn, figures = ask(teacher)
    batch = table.batch(np.array([7, 0, 23]))
    same(target_fn(batch), local(tmp_path, model, tokenizer, table)(batch))
    assert figures["target_positions"] == sum(row.targets for row in ROWS)
    assert figures["target_bytes_per_token"] == 4 * K + 2
    assert {body["path"] for body in bodies} == {"/v1/completions"}
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["prompt_logprobs"]) == ("toy", 1, K)
    assert sorted(tuple(body["prompt"]) for body in bodies) == sorted(row.ids for row in ROWS)


@pytest.mark.parametrize("style", ["behind", "raw", "numbered"])
def test_a_server_that_tells_texts_fills_the_same_cache(serve, ask, tmp_path, model, tokenizer, table, style):
    """Only what is written alike by several tokens (parts of characters, in text) is missing, and in the tail."""
    styles = Spelling(tokenizer, VOCAB).styles
    parts = {n: f"bytes:\\x{n:02x}" for n, text in enumerate(styles[0]) if "\ufffd" in text}
    write = {
        "behind": lambda n: parts.get(n, styles[0][n]),
        "raw": lambda n: styles[1][n],
        "numbered": lambda n: f"token_id:{n}",
    }

    def answer(handler, body, number):
        if "prompt_logprobs" in body:
            return 400, {"error": "unknown argument"}
        return by_text(model, body, write[style])

    teacher, bodies = serve(answer)
    target_fn, _ = ask(teacher)
    batch = table.batch(np.arange(24))
    found, exact = target_fn(batch), local(tmp_path, model, tokenizer, table)(batch)
    assert sum("prompt_logprobs" in body for body in bodies) == 1, "the form is found out once"
    if style != "behind":
        same(found, exact)
        return
    logprobs = OnlineTargets(model, vocab=VOCAB)(batch).narrow(0, len(batch.keep)).logprobs
    for at in range(len(batch.keep)):
        for token, value in zip(found.ids[at].tolist(), found.logprobs[at].tolist(), strict=True):
            if "\ufffd" not in styles[0][token]:
                assert value == pytest.approx(float(logprobs[at, token]), abs=4e-3) or value < float(found.log_tail[at])
    mass = found.logprobs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    student = torch.randn(len(batch.keep), VOCAB, generator=torch.Generator().manual_seed(0))
    assert (forward_kl(student, found)[0] > -1e-3).all()


def test_unknown_texts_go_to_the_tail(tokenizer):
    spelling = Spelling(tokenizer, VOCAB)
    style = spelling.style_of([(40, spelling.styles[0][40])])
    ordinary = [t for t in range(40, 90) if spelling.unique[0].get(spelling.styles[0][t]) == t][:3]
    texts = [spelling.styles[0][token] for token in ordinary]
    place = Place(texts[0], by_text={texts[0]: math.log(0.5), texts[1]: math.log(0.2), "never heard of": math.log(0.1)})
    coded = coded_places([(ordinary[0], place)], spelling, style, top_k=4)
    found = decode(coded)
    assert found.ids[0, :2].tolist() == ordinary[:2]
    assert found.logprobs[0, :2].exp().tolist() == pytest.approx([0.5, 0.2], rel=1e-3)
    left = 0.3 / (VOCAB - 2)
    assert found.logprobs[0, 2:].exp().tolist() == pytest.approx([left, left], rel=2e-2)
    assert float(found.log_tail.exp()) == pytest.approx(0.3 - 2 * left, rel=1e-2)
    assert len(set(found.ids[0].tolist())) == 4


def test_texts_that_several_tokens_share_are_nobodys(tokenizer):
    spelling = Spelling(tokenizer, VOCAB)
    broken = [token for token, text in enumerate(spelling.styles[0]) if "\ufffd" in text]
    assert len(broken) > 50, "the case needs bytes that are no characters"
    assert spelling.id_of("\ufffd", 0) is None
    assert spelling.id_of("token_id:7", 0) == 7
    place = Place("\ufffd", by_text={"\ufffd": math.log(0.9)})
    assert decode(coded_places([(broken[0], place)], spelling, 0, top_k=1)).ids.tolist() == [[broken[0]]]


def test_what_was_done_is_kept_and_gone_on_with(serve, ask, tmp_path, model, monkeypatch, table):
    monkeypatch.setattr(module, "SHARD_POSITIONS", 40)
    broken = threading.Event()

    def answer(handler, body, number):
        if number > 12 and not broken.is_set():
            return 500, {"error": "out of memory"}
        return by_number(model, body)

    teacher, bodies = serve(answer)
    with pytest.raises(EdgestillError, match=r"in 3 attempts; the last: HTTP 500.*12 of 24 rows are kept"):
        ask(teacher)
    kept = len(list((tmp_path / "targets").glob("shard-*.safetensors")))
    assert kept >= 1
    broken.set()
    before = len(bodies)
    target_fn, _ = ask(teacher)
    assert len(bodies) - before == len(ROWS) - 12, "no row that the server has told of is asked again"
    target_fn(table.batch(np.arange(24)))
    after = len(bodies)
    ask(teacher)
    assert len(bodies) == after, "a full cache asks nothing"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": []}, "not a completion with log-probabilities"),
        ([1], "not a completion with log-probabilities"),
        ({"choices": [{"prompt_logprobs": [None, {"5": {"logprob": "?"}}, {}, {}]}]}, "not a completion"),
        ({"choices": [{"prompt_logprobs": [None, *[{"5": {"logprob": 0.7}}] * 3]}]}, "that no distribution has"),
        ({"choices": [{"prompt_logprobs": [None, *[{"5": {"logprob": math.nan}}] * 3]}]}, "that no distribution has"),
        (
            {"choices": [{"prompt_logprobs": [None, *[{"5": {"logprob": -0.1}, "6": {"logprob": -0.2}}] * 3]}]},
            "that no distribution has",
        ),
    ],
)
def test_garbage_ends_after_the_attempts(serve, ask, reply, message):
    teacher, bodies = serve(lambda handler, body, number: reply)
    with pytest.raises(EdgestillError, match=f"no usable reply in 3 attempts; the last: .*{message}") as caught:
        ask(teacher, rows=RowTable(tiny_token_rows(1, tokens=4), vocab=VOCAB), top_k=2)
    assert len(bodies) == 3
    assert caught.value.exit_code == 1


def test_a_server_that_stops_half_way_or_stays_silent(serve, ask, model):
    def half(handler, body, number):
        content = json.dumps(by_number(model, body)).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:50])
        handler.close_connection = True

    teacher, bodies = serve(half)
    with pytest.raises(EdgestillError, match="in 3 attempts; the last: the connection broke after 50 of"):
        ask(teacher)
    assert len(bodies) == 3
    release = threading.Event()
    teacher, bodies = serve(lambda handler, body, number: release.wait(10) and None, timeout_s=0.15, attempts=2)
    started = time.monotonic()
    with pytest.raises(EdgestillError, match="in 2 attempts; the last: no reply in time"):
        ask(teacher, place="silent")
    assert (time.monotonic() - started, len(bodies)) < (3, 3)
    release.set()


def test_too_few_log_probabilities_are_refused(serve, ask, model):
    teacher, bodies = serve(lambda handler, body, number: by_number(model, {**body, "prompt_logprobs": 5}))
    with pytest.raises(UserError, match=r"gives [56] log-probabilities of a token, and top_k is 16.*Lower top_k to"):
        ask(teacher)
    assert len(bodies) == 1


@pytest.mark.parametrize("form", ["ids", "texts"])
def test_another_number_of_tokens_is_refused(serve, ask, model, form):
    def answer(handler, body, number):
        shorter = {**body, "prompt": body["prompt"][:-2]}
        if form == "ids":
            return by_number(model, shorter)
        return by_text(model, shorter, str) if "echo" in body else {"choices": [{"text": "x"}]}

    teacher, _ = serve(answer)
    with pytest.raises(UserError, match=r"the server tells of \d+ tokens where \d+ were sent"):
        ask(teacher)


def test_another_tokenizer_is_refused(serve, ask, tokenizer, model):
    behind = Spelling(tokenizer, VOCAB).styles[0]

    def answer(handler, body, number):
        return by_text(model, body, lambda n: f"{n} {behind[n]}") if "echo" in body else (422, {})

    teacher, _ = serve(answer)
    with pytest.raises(UserError, match=r"the server writes token \d+ as .*, and the tokenizer of the rows as"):
        ask(teacher)
    right = Spelling(tokenizer, VOCAB).alone
    teacher, _ = serve(lambda handler, body, number: by_number(model, body, lambda n: " " + right(n)))
    ask(teacher, place="right")
    teacher, _ = serve(lambda handler, body, number: by_number(model, body, lambda n: right((n + 1) % VOCAB)))
    with pytest.raises(UserError, match=r"the server writes token \d+ as .*, and the tokenizer of the rows as"):
        ask(teacher, place="wrong")


def test_a_server_that_fails_on_one_form_is_asked_in_the_other(serve, ask, model):
    def answer(handler, body, number):
        return by_text(model, body, str) if "echo" in body else (500, {"error": "unknown field"})

    teacher, bodies = serve(answer)
    scorer = PromptScorer(teacher.client, 4)
    assert len(scorer.places([[1, 2, 3]])[0]) == 2
    assert scorer.form == "echo"
    assert len(bodies) == 4  # all attempts in the first form, one in the other
    broken, bodies = serve(lambda handler, body, number: (500, {"error": "no memory"}))
    with pytest.raises(EdgestillError, match=r"no usable reply in 3 attempts; the last: HTTP 500.*no memory") as caught:
        ask(broken, place="broken")
    assert (len(bodies), caught.value.exit_code) == (6, 1)
    busy, bodies = serve(lambda handler, body, number: (503, {"error": "later"}))
    with pytest.raises(EdgestillError, match="HTTP 503"):
        ask(busy, place="busy")
    assert len(bodies) == 3


def test_a_server_that_tells_nothing_of_given_tokens_is_refused(serve, ask):
    teacher, bodies = serve(lambda handler, body, number: {"choices": [{"text": "hello", "logprobs": None}]})
    with pytest.raises(UserError, match=r"gives no log-probabilities of given tokens \(prompt_logprobs: .*; echo: "):
        ask(teacher)
    assert len(bodies) == 2
    chat_only, _ = serve(lambda handler, body, number: (404, {"error": "no such path"}))
    with pytest.raises(UserError, match=r"no log-probabilities of given tokens .*HTTP 404"):
        ask(chat_only, place="chat")
    locked, bodies = serve(lambda handler, body, number: (401, {"error": "who are you"}))
    with pytest.raises(UserError, match="Set the environment variable OPENAI_API_KEY"):
        ask(locked, place="locked")
    assert len(bodies) == 1


def test_figures_that_cease_are_asked_for_again(serve, model):
    def answer(handler, body, number):
        return by_number(model, body) if number == 1 else {"choices": [{"text": "x"}]}

    teacher, bodies = serve(answer, parallel=1)
    with pytest.raises(EdgestillError, match="has no prompt_logprobs, though earlier replies had them"):
        PromptScorer(teacher.client, 4).places([(1, 9, 10), (1, 9, 11)])
    assert len(bodies) == 4
    assert PromptScorer(teacher.client, 4).places([]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": "online"}, r"logits\.targets: online, and an endpoint is asked once"),
        ({"codec": "sample", "top_k": 32}, r"logits\.codec: sample, and an endpoint tells the likeliest tokens alone"),
        ({"temperature": 2.0}, r"logits\.temperature: 2\.0, and an endpoint tells the distribution at temperature 1"),
    ],
)
def test_what_only_a_whole_distribution_gives_is_refused(serve, ask, given, message):
    teacher, bodies = serve(lambda handler, body, number: {})
    with pytest.raises(UserError, match=message):
        ask(teacher, **given)
    assert not bodies


def test_the_cache_of_another_endpoint_is_refused(serve, ask, model):
    first, _ = serve(lambda handler, body, number: by_number(model, body))
    second, _ = serve(lambda handler, body, number: by_number(model, body))
    ask(first)
    with pytest.raises(DataError, match="the cache's teacher is"):
        ask(second)
