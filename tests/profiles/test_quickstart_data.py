"""The embedded assistant's data: deterministic, disjoint from the test, and as noisy as it says."""

import json
from pathlib import Path
from random import Random

import pytest

from evaluators.metrics import parse_call
from profiles.quickstart import grammar, make_data

FOLDER = Path(make_data.__file__).parent


def lines(name):
    """One of the committed files."""
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def arguments(request):
    """How many arguments the call has; one alone is no combination."""
    return len(json.loads(request.call).get("args", {}))


def test_committed_files_are_what_the_maker_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_data", "--out", str(tmp_path)])
    make_data.main()
    for name in ("pool.jsonl", "pool_noise.jsonl", "reference.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_no_phrasing_of_the_test_side_is_on_the_training_side():
    for name in grammar.NAMES:
        sides = [{t for group in grammar.phrasings(name, test) for t in group} for test in (False, True)]
        assert sides[0]
        assert sides[1]
        assert not sides[0] & sides[1], name


def test_no_argument_combination_of_the_test_side_is_drawn_for_training():
    rng = Random(3)
    train = {grammar.draw(rng.choice(grammar.NAMES), rng, test=False).combination for _ in range(20_000)}
    asked = [grammar.draw(rng.choice(grammar.NAMES), rng, test=True) for _ in range(3_000)]
    held = {r.combination for r in asked if r.function not in grammar.SPLIT_BY_PHRASING and arguments(r) > 1}
    assert len(held) > 500
    assert not held & train


def test_no_test_utterance_is_in_the_pool_or_the_reference():
    asked = {row["prompt"] for row in lines("test.jsonl")}
    assert len(asked) == len(lines("test.jsonl"))
    assert not asked & {row["prompt"] for name in ("pool.jsonl", "reference.jsonl") for row in lines(name)}


def test_there_are_at_least_twelve_functions_and_every_one_is_tested():
    assert len(grammar.FUNCTIONS) >= 12
    tested = {json.loads(row["response"])["name"] for row in lines("test.jsonl")}
    assert tested == set(grammar.NAMES)


def test_every_clean_answer_is_one_typed_call():
    types = {"level": int, "degrees": int, "minutes": int, "value": (int, float)}
    for name in ("test.jsonl", "reference.jsonl"):
        for row in lines(name):
            call = parse_call(row["response"])
            assert call is not None
            assert all(isinstance(v, types.get(k, str)) for k, v in call["args"].items()), row


def test_the_pool_is_as_noisy_as_it_says():
    rows, noise = lines("pool.jsonl"), lines("pool_noise.jsonl")
    counts = {kind: sum(n["noise"] == kind for n in noise) for kind in make_data.NOISE}
    assert counts == {kind: round(share * len(rows)) for kind, share in make_data.NOISE.items()}
    scolded = [n["line"] for n in noise if n["noise"] == "abusive_tone"]
    assert all(any(s in rows[line - 1]["prompt"] for s in make_data.SCOLDING) for line in scolded)


def test_wrong_labels_are_wrong():
    rng = Random(9)
    for _ in range(200):
        row = make_data.pair(grammar.draw(rng.choice(grammar.NAMES), rng, test=False))
        assert make_data.wrong_label(row, rng, list(grammar.NAMES))["response"] != row["response"]


def test_slots_survive_dialect_and_typos():
    rng = Random(4)
    for _ in range(500):
        request = grammar.draw("send_message", rng, test=False)
        assert json.loads(request.call)["args"]["text"] in request.utterance.lower()


@pytest.mark.parametrize(("line", "flat"), [("(a|b) x", ["a x", "b x"]), ("{r} (|now)", ["{r}", "{r} now"])])
def test_expand(line, flat):
    assert grammar.expand(line) == flat
