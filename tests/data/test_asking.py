"""What a stage keeps of a teacher's answers: each one, whatever ends the work, and nothing is asked twice."""

from __future__ import annotations

import json
import math

import pytest

from compress.data.asking import Asker
from compress.data.quality.params import MislabelParams
from compress.data.quality.stabilization import mislabel
from compress.data.rows import chat_row, read_rows
from compress.endpoint import Reply
from compress.errors import UserError
from compress.teachers import EndpointTeacher
from tests.data.stages import make_context
from tests.test_teachers import Server, completion, send

CALLS = {"good day": '{"name":"greet"}', "lamp on": '{"name":"lamp"}', "lock up": '{"name":"lock"}'}
POOL = [chat_row(asked, answer) for asked, answer in CALLS.items()]
NAME = "data.quality.mislabel"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    running = []

    def start(behaviour):
        running.append(Server(behaviour))
        return EndpointTeacher(running[-1].url, "toy", attempts=1), running[-1]

    yield start
    for server in running:
        server.close()


def asks(count):
    return [[{"role": "user", "content": str(number)}] for number in range(count)]


def test_a_refusal_costs_no_answer_and_says_how_many_are_kept(serve, tmp_path):
    def behaviour(handler, body, number):
        if 7 <= number <= 10:
            return send(handler, b"no credit", code=402)
        return send(handler, completion("re " + body["messages"][0]["content"], logprobs=[-0.5]))

    teacher, server = serve(behaviour)
    ctx = make_context(tmp_path, POOL, name=NAME, teacher=teacher)
    with pytest.raises(UserError, match=r"402: no credit.* (\d+) answers are kept; the same command") as caught:
        Asker(ctx).answers(asks(20), place="x", max_new_tokens=4)
    good = sum(number < 7 or number > 10 for number in range(1, len(server.bodies) + 1))
    assert f". {good} answers are kept" in str(caught.value)
    replies = Asker(ctx).answers(asks(20), place="x", max_new_tokens=4)
    assert [reply.text for reply in replies] == [f"re {number}" for number in range(20)]
    assert len(server.bodies) == 20 + 4
    assert Asker(ctx).answers(asks(20), place="x", max_new_tokens=4) == replies
    assert len(server.bodies) == 20 + 4, "what is kept is not asked again"


def test_a_refusal_before_the_first_answer_promises_nothing(serve, tmp_path):
    teacher, _ = serve(lambda handler, body, number: send(handler, b"no", code=403))
    with pytest.raises(UserError, match="403") as caught:
        Asker(make_context(tmp_path, POOL, name=NAME, teacher=teacher)).answers(asks(9), place="x", max_new_tokens=4)
    assert "kept" not in str(caught.value)


def test_notes_are_kept_with_the_answers(serve, tmp_path):
    def behaviour(handler, body, number):
        if "seed" in body:
            return send(handler, b'{"error": "Unknown field: seed"}', code=400)
        return send(
            handler, completion("<think>hm</think>yes" if body["messages"][0]["content"] == "0" else "<think>hm")
        )

    teacher, _ = serve(behaviour)
    ctx = make_context(tmp_path, POOL, name=NAME, teacher=teacher)
    said = []
    for _ in range(2):  # the second time nothing is asked
        asker = Asker(ctx)
        asker.answers(asks(3), place="x", max_new_tokens=4)
        said.append(asker.notes(confidence=True))
    assert said[0] == said[1]
    assert said[0][0] == "the server does not take seed, and was asked without"
    assert "gives no log-probabilities" in said[0][1]
    assert said[0][2].startswith("3 of 3 replies held thoughts, which were taken out; 2 of them came to no answer")


@pytest.mark.parametrize(
    "style", ["<think>\nThe user wants it.\n</think>\n\n{}", "The user wants it.\n</think>\n{}", "{}"]
)
@pytest.mark.parametrize("sure", [True, False])
def test_thoughts_neither_contradict_nor_become_answers(serve, tmp_path, style, sure):
    """The teacher is right but for one row, which is wrong in the pool."""
    pool = [*POOL[:2], chat_row("lock up", '{"name":"lamp"}')]

    def behaviour(handler, body, number):
        text = style.replace("{}", CALLS[body["messages"][0]["content"]])
        thought, _, answer = text.rpartition("\n")
        tokens = [*([thought + "\n"] if thought else []), answer]
        listed = [{"token": token, "logprob": -5.0 if "user" in token else -0.01} for token in tokens]
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        choice |= {"logprobs": {"content": listed}} if sure else {}
        send(handler, json.dumps({"choices": [choice]}).encode())

    teacher, _ = serve(behaviour)
    ctx = make_context(tmp_path, pool, name=NAME, teacher=teacher)
    done = mislabel(MislabelParams(action="relabel"), ctx)
    rows = {row.user: row for row in read_rows(ctx.out)}
    assert set(rows) == set(CALLS)
    assert done.metrics["relabelled"] == int(sure)
    assert all(rows[asked].answer == CALLS[asked] for asked in CALLS if sure or asked != "lock up")
    assert not any("think" in row.answer for row in rows.values())


def test_an_empty_answer_contradicts_nothing(serve, tmp_path):
    teacher, _ = serve(lambda handler, body, number: send(handler, completion("", logprobs=[-0.01])))
    ctx = make_context(tmp_path, POOL, name=NAME, teacher=teacher)
    assert mislabel(MislabelParams(action="drop"), ctx).metrics["rows_out"] == 3


def test_rows_that_hold_thoughts_are_compared_by_their_answers(serve, tmp_path):
    pool = [chat_row("lamp on", '<think>old thoughts</think>{"name":"lamp"}')]
    teacher, _ = serve(lambda handler, body, number: send(handler, completion('{"name":"lamp"}', logprobs=[-0.01])))
    ctx = make_context(tmp_path, pool, name=NAME, teacher=teacher)
    assert mislabel(MislabelParams(action="relabel"), ctx).metrics["relabelled"] == 0
    assert read_rows(ctx.out)[0].answer == pool[0].answer


def test_a_teacher_of_batches_is_asked_for_whole_chunks(tmp_path):
    class Batches:
        def __init__(self):
            self.asked: list[int] = []

        def answer(self, conversations, *, keep, **_):
            self.asked.append(len(conversations))
            keep(0, Reply("a", math.nan, True))
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return [Reply("a", math.nan, True)] * len(conversations)

    teacher = Batches()
    ctx = make_context(tmp_path, POOL, name=NAME, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        Asker(ctx).answers(asks(3), place="x")
    assert len(Asker(ctx).answers(asks(3), place="x")) == 3
    assert len(Asker(ctx).answers(asks(3), place="x")) == 3
    assert teacher.asked == [3, 3]
