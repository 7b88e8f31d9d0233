"""Teachers against slow references, and a server that misbehaves in every way it can."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AddedToken

from compress.answers import Generation, TokenScores
from compress.encoding import TokenRow, encode_prompt, load_tokenizer
from compress.endpoint import Reply
from compress.errors import DataError, EdgestillError, ModelError, UserError
from compress.local_teacher import Sampling, _uniforms, length_batches
from compress.progress import Progress
from compress.teachers import EndpointTeacher, LocalTeacher, RecordedTeacher, open_teacher, record
from tests.reference import quality as slow
from tests.tiny import BOS, END, tiny_checkpoint, tiny_token_rows

ASK = [{"role": "user", "content": "dim the lights"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), scale=0.3)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> LocalTeacher:
    return LocalTeacher(folder, threads=1)


# ---------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_scores_equal_a_plain_loop_over_rows(tmp_path: Path, arch: str, batch_tokens: int) -> None:
    found = LocalTeacher(tiny_checkpoint(tmp_path, arch, scale=0.3), threads=1, batch_tokens=batch_tokens)
    rows = tiny_token_rows(23, tokens=(2, 5, 17, 9, 30))
    for row, scores in zip(rows, found.score(rows), strict=True):
        expected = slow.token_scores(found.model, row.ids, row.answer)
        np.testing.assert_allclose(scores.logprob, [e[0] for e in expected], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scores.best_logprob, [e[1] for e in expected], rtol=1e-5, atol=1e-5)
        assert scores.is_argmax.tolist() == [e[2] for e in expected]


def test_rows_without_targets_get_empty_scores(teacher: LocalTeacher) -> None:
    blank = TokenRow("a", (BOS, 9, 10), (0, 0, 0))
    (other,) = tiny_token_rows(1)
    found = teacher.score([blank, other, blank])
    assert [len(scores.logprob) for scores in found] == [0, sum(other.answer), 0]
    assert len(teacher.score([blank])[0].logprob) == 0
    assert teacher.score([]) == []


def test_agreement_is_that_greedy_decoding_writes_the_answer(teacher: LocalTeacher) -> None:
    prompts = [row.ids for row in tiny_token_rows(12, tokens=6)]
    rows = []
    for prompt, said in zip(prompts, teacher.generate(prompts, max_new_tokens=5, stop_ids=()), strict=True):
        rows.append(TokenRow("x", (*prompt, *said.ids), (0,) * len(prompt) + (1,) * len(said.ids)))
    right = teacher.score(rows)
    assert all(scores.agrees for scores in right)
    spoilt = [TokenRow("x", (*row.ids[:-2], (row.ids[-2] + 1) % 320, row.ids[-1]), row.answer) for row in rows]
    assert not any(scores.agrees for scores in teacher.score(spoilt))


def test_the_head_is_cut_into_slices_without_a_trace(teacher: LocalTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_token_rows(9)
    whole = teacher.score(rows)
    monkeypatch.setattr("compress.local_teacher.HEAD_ENTRIES", 320 * 3)  # three positions at a time
    for a, b in zip(whole, teacher.score(rows), strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-6)


def test_rows_that_cannot_be_scored_are_named(teacher: LocalTeacher) -> None:
    with pytest.raises(DataError, match="row long: has 257 tokens; expected 1 to 256"):
        teacher.score([TokenRow("long", (1,) * 257, (0,) + (1,) * 256)])
    with pytest.raises(DataError, match="row bare: its first token is a target"):
        teacher.score([TokenRow("bare", (1, 2), (1, 1))])


def test_length_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 100, 7, 7, 3, 60, 8, 1]
    found = list(length_batches(lengths, 64))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64


def test_embeddings_equal_the_mean_state(teacher: LocalTeacher) -> None:
    rows = [*tiny_token_rows(9), TokenRow("one", (BOS,), (0,))]
    found = teacher.embed(rows)
    assert found.shape == (10, 32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    for row, point in zip(rows, found, strict=True):
        np.testing.assert_allclose(point, slow.mean_state(teacher.model, row.ids), atol=1e-5)


# ---------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_equals_transformers_token_for_token(teacher: LocalTeacher, batch_size: int) -> None:
    prompts = [row.ids for row in tiny_token_rows(13, tokens=(3, 6, 11, 20))]
    found = teacher.generate(prompts, max_new_tokens=24, stop_ids=range(0, 320, 9), batch_size=batch_size)
    ends = set()
    for prompt, said in zip(prompts, found, strict=True):
        with torch.inference_mode():
            whole = teacher.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=list(range(0, 320, 9)),
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        stopped = whole[-1] % 9 == 0
        assert list(said.ids) == (whole[:-1] if stopped else whole)
        assert said.finished == stopped
        row = TokenRow("x", (*prompt, *whole), (0,) * len(prompt) + (1,) * len(whole))
        assert said.mean_logprob == pytest.approx(float(teacher.score([row])[0].logprob.mean()), abs=1e-5)
        ends.add((stopped, len(whole)))
    assert len(ends) > 3, "the case needs rows that end at different lengths"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6), (1.5, 0.95)])
def test_sampling_equals_the_plain_version(teacher: LocalTeacher, temperature: float, top_p: float) -> None:
    prompts = [row.ids for row in tiny_token_rows(4, tokens=(3, 8))]
    sampling = Sampling(10, frozenset(range(0, 320, 20)), temperature, top_p, seed=5)
    found = teacher.generate(
        prompts, max_new_tokens=10, temperature=temperature, top_p=top_p, stop_ids=sampling.stop_ids, seed=5
    )
    for index, (prompt, said) in enumerate(zip(prompts, found, strict=True)):
        draws = _uniforms(sampling, index).tolist()
        ids, logprobs = slow.sample(
            teacher.model, prompt, draws, temperature=temperature, top_p=top_p, stop=sampling.stop_ids
        )
        assert list(said.ids) == ids
        assert said.mean_logprob == pytest.approx(np.mean(logprobs), abs=1e-5)


def test_sampling_does_not_depend_on_the_batch(teacher: LocalTeacher) -> None:
    prompts = [row.ids for row in tiny_token_rows(16, tokens=(2, 5, 9))]
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3, "stop_ids": range(0, 320, 16)}
    whole = teacher.generate(prompts, batch_size=64, **options)
    for size in (1, 7):
        found = teacher.generate(prompts, batch_size=size, **options)
        assert [g.ids for g in found] == [g.ids for g in whole]
        assert [g.finished for g in found] == [g.finished for g in whole]
    assert [g.ids for g in teacher.generate(prompts[:5], **options)] == [g.ids for g in whole[:5]]
    assert len({g.ids for g in teacher.generate([prompts[0]] * 30, **options)}) > 20, "rows draw on their own"
    other = teacher.generate(prompts, **{**options, "seed": 4})
    assert [g.ids for g in other] != [g.ids for g in whole]


def test_sampled_frequencies_follow_the_probabilities(teacher: LocalTeacher) -> None:
    prompt = (BOS, 9, 30)
    with torch.inference_mode():
        expected = torch.softmax(teacher.model(input_ids=torch.tensor([prompt])).logits[0, -1], -1).numpy()
    found = teacher.generate([prompt] * 4000, max_new_tokens=1, temperature=1.0, seed=1, stop_ids=(), batch_size=1000)
    counts = np.bincount([g.ids[0] for g in found], minlength=320)
    common = expected * 4000 >= 20
    chi = ((counts - expected * 4000)[common] ** 2 / (expected * 4000)[common]).sum()
    freedom = int(common.sum()) - 1
    assert freedom > 10
    assert chi < freedom + 4 * math.sqrt(2 * freedom)  # about 4 standard deviations


def test_a_full_context_ends_a_row_and_no_other(teacher: LocalTeacher) -> None:
    long, short = (BOS,) * 250, (BOS, 7, 8)
    together = teacher.generate([long, short], max_new_tokens=20, stop_ids=())
    assert [len(g.ids) for g in together] == [6, 20]
    assert not together[0].finished
    assert together[1].ids == teacher.generate([short], max_new_tokens=20, stop_ids=())[0].ids


@pytest.mark.parametrize("prompt", [(), (BOS,) * 256])
def test_prompts_without_room_are_refused(teacher: LocalTeacher, prompt: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"prompt 1: has \d+ tokens; expected 1 to 255"):
        teacher.generate([(BOS,), prompt], max_new_tokens=4)


def test_answers_go_through_the_template(teacher: LocalTeacher) -> None:
    (reply,) = teacher.answer([ASK], max_new_tokens=8)
    (said,) = teacher.generate([encode_prompt(ASK, teacher.tokenizer)], max_new_tokens=8)
    assert reply.text == teacher.tokenizer.decode(said.ids, skip_special_tokens=True)
    assert reply.mean_logprob == said.mean_logprob


def test_progress_counts_every_row(teacher: LocalTeacher) -> None:
    totals: list[int] = []

    class Counting(Progress):
        @contextmanager
        def bar(self, what: str, total: int) -> Iterator[Any]:
            with super().bar(what, total) as bar:
                yield bar
            totals.append(bar.done)

    progress = Counting(quiet=True)
    rows = tiny_token_rows(11)
    teacher.score(rows, progress)
    teacher.embed(rows, progress)
    teacher.generate([row.ids for row in rows], max_new_tokens=2, progress=progress)
    assert totals == [11, 11, 11]


# ---------------------------------------------------------------------------------- a folder


def test_stop_ids_come_from_tokenizer_and_generation_config(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert LocalTeacher(folder).stop_ids == (1, END, 9)
    (folder / "generation_config.json").write_text("{ cut")
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be read"):
        _ = LocalTeacher(folder).stop_ids


def test_identity_follows_the_files(tmp_path: Path) -> None:
    a, b = tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b")
    assert LocalTeacher(a).identity == LocalTeacher(b).identity
    (b / "chat_template.jinja").write_text("changed")
    assert LocalTeacher(a).identity != LocalTeacher(b).identity


def test_open_teacher_tells_kinds_apart(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_teacher(folder), LocalTeacher)
    record(tmp_path / "replies.jsonl", [ASK], [Reply("{}", -0.1, True)])
    assert isinstance(open_teacher(tmp_path / "replies.jsonl"), RecordedTeacher)
    for address in ("http://localhost:9/v1#llama", Path("http://localhost:9/v1#llama")):
        found = open_teacher(address)
        assert isinstance(found, EndpointTeacher)
        assert (found.client.url, found.client.model) == ("http://localhost:9/v1", "llama")
    with pytest.raises(ModelError, match="no such folder"):
        open_teacher(tmp_path / "absent")
    with pytest.raises(UserError, match="names no model"):
        open_teacher("http://localhost:9/v1")


def test_a_hub_name_that_cannot_be_fetched_is_a_model_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="nobody/nothing: is no folder here and cannot be fetched"):
        open_teacher("nobody/nothing")


# ---------------------------------------------------------------------------------- recorded replies


def test_recorded_replies_come_back(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    other = [{"role": "user", "content": "lock the door"}]
    record(path, [ASK, other], [Reply("{}", -0.25, True), Reply("no", math.nan, False)])
    found = RecordedTeacher(path)
    first, second = found.answer([other, ASK], max_new_tokens=4)
    assert (first.text, first.finished, math.isnan(first.mean_logprob)) == ("no", False, True)
    assert second == Reply("{}", -0.25, True)
    with pytest.raises(DataError, match="no reply to 'something else'"):
        found.answer([[{"role": "user", "content": "something else"}]])
    for ask in (lambda: found.score([]), lambda: found.embed([]), lambda: found.generate([]), lambda: found.tokenizer):
        with pytest.raises(UserError, match="a recording cannot"):
            ask()


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\ufeff"])
def test_a_recording_may_hold_every_line_end_of_unicode(tmp_path: Path, sign: str) -> None:
    asked = [{"role": "user", "content": f"pasted{sign}from a page"}]
    record(
        tmp_path / "replies.jsonl",
        [asked, ASK],
        [Reply(f"{sign}one{sign}", -0.5, True), Reply("half \ud83d", -1, True)],
    )
    found = RecordedTeacher(tmp_path / "replies.jsonl").answer([asked, ASK])
    assert [reply.text for reply in found] == [f"{sign}one{sign}", "half \ufffd"]


def test_thoughts_of_a_recording_are_no_answers(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "lock the door"}]
    path = tmp_path / "replies.jsonl"
    record(path, [ASK, other], [Reply("<think>hm</think>\n{}", -0.25, True), Reply("<think>hm", -0.25, True)])
    first, second = RecordedTeacher(path).answer([ASK, other])
    assert (first.text, first.finished, math.isnan(first.mean_logprob)) == ("{}", True, True)
    assert (second.text, second.finished) == ("", False)


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_of_a_local_model_are_no_answers(tmp_path: Path, special: bool) -> None:
    folder = tiny_checkpoint(tmp_path, scale=0.3)
    tokenizer = load_tokenizer(folder)
    tokens = [AddedToken(text, special=special) for text in ("[THINK]", "[/THINK]")]
    tokenizer.add_tokens(tokens, special_tokens=special)
    opens, closes = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    found = LocalTeacher(folder, threads=1)
    found.__dict__["tokenizer"] = tokenizer
    prompt = tuple(encode_prompt(ASK, tokenizer))
    hm, yes = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("hm", "yes"))
    scored: list[TokenRow] = []

    def score(rows: Any) -> list[TokenScores]:
        scored.extend(rows)
        ones = np.ones(sum(rows[0].answer), np.float32)
        return [TokenScores(-2 * ones, ones, ones > 0) for _ in rows]

    found.score = score  # type: ignore[method-assign]
    said = [Generation((opens, *hm, closes, *yes), -9.0, True), Generation((opens, *hm), -9.0, False)]
    said += [Generation(yes, -1.0, True)]
    first, second, third = found._replies([prompt] * 3, said)
    assert first == Reply("yes", -2.0, True, thoughts=True)
    assert (second.text, second.finished, math.isnan(second.mean_logprob)) == ("", False, True)
    assert third == Reply("yes", -1.0, True)
    assert [row.ids for row in scored] == [(*prompt, opens, *hm, closes, *yes)]
    assert sum(scored[0].answer) == len(yes)
    (open_prompt,) = found._replies([(*prompt, opens)], [Generation((*hm, closes, *yes), -9.0, True)])
    assert open_prompt.text == "yes"


@pytest.mark.parametrize("line", ["{ cut", "[]", '{"messages": []}', '{"messages": [{"role": "user"}], "reply": "x"}'])
def test_a_bad_line_of_a_recording_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"messages": [], "reply": "x"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"replies\.jsonl:3: .*expected an object such as"):
        RecordedTeacher(path)


# ---------------------------------------------------------------------------------- an endpoint


class Server:
    """A server on loopback whose every reply is what ``behaviour`` does with the request."""

    def __init__(self, behaviour: Callable[[BaseHTTPRequestHandler, dict[str, Any], int], None]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append({**body, "path": self.path})
                    outer.headers.append(dict(self.headers))
                    number = len(outer.bodies)
                with suppress(BrokenPipeError, ConnectionResetError):  # some tests want the client to give up
                    behaviour(self, body, number)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, *, code: int = 200, **headers: str) -> None:
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def completion(text: str | None, *, logprobs: list[float] | None = None, why: str = "stop") -> bytes:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": why}
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": value} for value in logprobs]}
    return json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[EndpointTeacher, Server]]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running: list[Server] = []

    def start(behaviour: Any, **options: Any) -> tuple[EndpointTeacher, Server]:
        running.append(Server(behaviour))
        settings = {"timeout_s": 5.0, "attempts": 3, "backoff_s": 0.01, **options}
        return EndpointTeacher(running[-1].url, "toy", **settings), running[-1]

    yield start
    for server in running:
        server.close()


def asks(count: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": str(number)}] for number in range(count)]


def test_endpoint_answers_in_order_with_its_settings(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(handler: Any, body: Any, number: int) -> None:
        time.sleep(0.02 if number % 2 else 0.0)  # replies overtake each other
        send(handler, completion("re " + body["messages"][0]["content"], logprobs=[-0.5, -0.1]))

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    teacher, server = serve(echo)
    replies = teacher.answer(asks(12), max_new_tokens=9, temperature=0.5, top_p=0.8, seed=4)
    assert [reply.text for reply in replies] == [f"re {n}" for n in range(12)]
    assert replies[0].mean_logprob == pytest.approx(-0.3)
    assert replies[0].finished
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"], body["seed"]) == (
        "toy",
        9,
        0.5,
        0.8,
        4,
    )
    assert body["logprobs"] is True
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_endpoint_without_logprobs_or_text(serve: Any) -> None:
    teacher, server = serve(lambda handler, body, number: send(handler, completion(None, why="length")))
    (reply,) = teacher.answer(asks(1), max_new_tokens=4)
    assert (reply.text, reply.finished, math.isnan(reply.mean_logprob)) == ("", False, True)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "garbage",
    [b"<html>oops</html>", b"{}", b'{"choices": []}', b"[1]", b"\xff\xfe", b"", b'{"choices": [{"message": 3}]}'],
)
def test_endpoint_garbage_ends_after_the_attempts(serve: Any, garbage: bytes) -> None:
    teacher, server = serve(lambda handler, body, number: send(handler, garbage))
    with pytest.raises(
        EdgestillError, match="no usable reply in 3 attempts; the last: not a chat completion"
    ) as caught:
        teacher.answer(asks(1), max_new_tokens=4)
    assert len(server.bodies) == 3
    assert caught.value.exit_code == 1


def test_endpoint_that_stops_half_way_is_asked_again(serve: Any) -> None:
    def half(handler: Any, body: Any, number: int) -> None:
        whole = completion("fine")
        if number < 3:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(whole)))
            handler.end_headers()
            handler.wfile.write(whole[:20])
            handler.close_connection = True
        else:
            send(handler, whole)

    teacher, server = serve(half)
    assert teacher.answer(asks(1), max_new_tokens=4)[0].text == "fine"
    assert len(server.bodies) == 3
    teacher, _ = serve(half, attempts=2)
    with pytest.raises(EdgestillError, match="in 2 attempts; the last: the connection broke after 20 of"):
        teacher.answer(asks(1), max_new_tokens=4)


def test_endpoint_that_stays_silent_times_out(serve: Any) -> None:
    release = threading.Event()
    teacher, server = serve(lambda handler, body, number: release.wait(10) and None, timeout_s=0.15, attempts=2)
    started = time.monotonic()
    with pytest.raises(EdgestillError, match="in 2 attempts; the last: no reply in time"):
        teacher.answer(asks(1), max_new_tokens=4)
    assert time.monotonic() - started < 3
    assert len(server.bodies) == 2
    release.set()


def test_endpoint_that_hangs_up(serve: Any) -> None:
    teacher, _ = serve(lambda handler, body, number: handler.connection.close(), attempts=2)
    with pytest.raises(EdgestillError, match="no usable reply in 2 attempts"):
        teacher.answer(asks(1), max_new_tokens=4)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(lambda *_: None)
    server.close()
    teacher = EndpointTeacher(server.url, "toy", attempts=2, backoff_s=0.01)
    with pytest.raises(EdgestillError, match=r"in 2 attempts.*refused"):
        teacher.answer(asks(1), max_new_tokens=4)


def test_busy_endpoint_is_waited_for_as_it_asks(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("compress.endpoint.Ending.pause", lambda _, seconds: pauses.append(seconds))

    def busy(handler: Any, body: Any, number: int) -> None:
        if number == 1:
            send(handler, b"slow down", code=429, Retry_After="7")
        elif number == 2:
            send(handler, b"", code=503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
        elif number == 3:
            send(handler, b"", code=500, Retry_After="9999")
        else:
            send(handler, completion("fine"))

    teacher, _ = serve(busy, attempts=4, backoff_s=0.5)
    assert teacher.answer(asks(1), max_new_tokens=4)[0].text == "fine"
    assert pauses == [7.0, 1.0, 30.0]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(401, "OPENAI_API_KEY"), (403, "Check the key"), (404, "Check the URL"), (400, "Check the endpoint's settings")],
)
def test_refusals_are_the_users_to_correct_and_not_repeated(serve: Any, code: int, advice: str) -> None:
    teacher, server = serve(lambda handler, body, number: send(handler, b'{"error": "no"}', code=code))
    with pytest.raises(UserError, match=rf"the server refuses: HTTP {code}: .*no.*{advice}"):
        teacher.answer(asks(1), max_new_tokens=4)
    assert len(server.bodies) == 1


def test_the_first_failure_stops_the_rest(serve: Any) -> None:
    teacher, server = serve(lambda handler, body, number: send(handler, b"no", code=400), parallel=2)
    with pytest.raises(UserError, match="refuses"):
        teacher.answer(asks(200), max_new_tokens=4)
    assert len(server.bodies) < 100


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "a URL such as http://localhost"),
        ("localhost:8000", "a URL such as http://localhost"),
        ("http://me:pw@localhost/v1", "holds a password"),
    ],
)
def test_endpoint_urls_are_checked(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EndpointTeacher(url, "toy")


def test_an_endpoint_says_what_it_cannot_do() -> None:
    teacher = EndpointTeacher("http://localhost:9/v1", "toy")
    assert teacher.can == {"answer"}
    assert teacher.folder is None
    assert teacher.identity == EndpointTeacher("http://localhost:9/v1", "toy").identity
    assert teacher.identity != EndpointTeacher("http://localhost:9/v1", "other").identity
    with pytest.raises(UserError, match="an endpoint cannot score given answers"):
        teacher.score([])
    with pytest.raises(UserError, match="an endpoint cannot continue tokens"):
        teacher.generate([[1]], max_new_tokens=4)
