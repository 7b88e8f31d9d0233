"""Scores of calls: hand-made cases, and what must never count as right."""

import pytest

from evaluators.metrics import parse_call, score_calls

RIGHT = '{"name":"set_light","args":{"room":"kitchen","level":30}}'


def test_a_copy_of_the_reference_scores_one_everywhere():
    scores = score_calls([RIGHT, '{"name":"none"}'], [RIGHT, '{"name":"none"}'])
    assert {name: list(values) for name, values in scores.items()} == {key: [1.0, 1.0] for key in scores}


@pytest.mark.parametrize(
    ("answer", "exact", "function", "f1", "valid"),
    [
        ('{"args":{"level":30,"room":"kitchen"},"name":"set_light"}', 1, 1, 1, 1),  # order is free
        ('{"name":"set_light","args":{"room":"kitchen","level":30.0}}', 1, 1, 1, 1),  # 30.0 is the number 30
        ('{"name":"set_light","args":{"room":"kitchen","level":"30"}}', 0, 1, 0.5, 1),  # a string is no number
        ('{"name":"set_light","args":{"room":"kitchen","level":true}}', 0, 1, 0.5, 1),
        ('{"name":"set_light","args":{"room":"kitchen"}}', 0, 1, 2 / 3, 1),
        ('{"name":"set_light","args":{"room":"kitchen","level":30,"x":1}}', 0, 1, 0.8, 1),
        ('{"name":"set_color","args":{"room":"kitchen","level":30}}', 0, 0, 0, 1),
        (RIGHT + " ok", 0, 0, 0, 0),
        (RIGHT[:-1], 0, 0, 0, 0),
        ("[1]", 0, 0, 0, 0),
        ('{"name":"set_light","args":{"room":"kitchen","level":NaN}}', 0, 0, 0, 0),
        ('{"name":"set_light","name":"set_light","args":{}}', 0, 0, 0, 0),
        ('{"name":"set_light","args":[],"more":1}', 0, 0, 0, 0),
        ("[" * 100_000, 0, 0, 0, 0),  # deep nesting must not end the evaluation
    ],
)
def test_known_answers(answer, exact, function, f1, valid):
    scores = score_calls([answer], [RIGHT])
    assert scores["exact_match"][0] == exact
    assert scores["function_accuracy"][0] == function
    assert scores["argument_f1"][0] == pytest.approx(f1)
    assert scores["valid_json"][0] == valid


def test_a_call_without_arguments_equals_one_with_an_empty_object():
    assert score_calls(['{"name":"none","args":{}}'], ['{"name":"none"}'])["exact_match"][0] == 1


def test_one_and_true_are_different_values():
    assert parse_call('{"name":"f","args":{"a":1}}') is not None
    scores = score_calls(['{"name":"f","args":{"a":true}}'], ['{"name":"f","args":{"a":1}}'])
    assert scores["exact_match"][0] == 0


def test_bad_references_and_lengths_are_errors():
    with pytest.raises(ValueError, match="reference 0 is not a call"):
        score_calls([RIGHT], ["no call"])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score_calls([RIGHT], [RIGHT, RIGHT])
