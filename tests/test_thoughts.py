"""Thoughts and answers: every known way of writing them, texts that only look like it, and time that stays linear."""

import time

import pytest

from compress.thoughts import NOTHING, Split, ends_open, is_marker, split_thoughts


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>hm</think>yes", "yes"),
        ("\n<think>\nIt is\nlong.\n</think>\n\nyes\n", "yes"),
        ("<think>\n\n</think>\n\nyes", "yes"),
        ("<THINK>hm</Think>yes", "yes"),
        ("<thinking>hm</thinking>yes", "yes"),
        ("<thought>hm</thought> yes", "yes"),
        ("<reasoning>hm</reasoning><answer>yes</answer>", "yes"),
        ("<seed:think>hm</seed:think>yes", "yes"),
        ("[THINK]hm[/THINK]yes", "yes"),
        ("◁think▷hm◁/think▷yes", "yes"),
        ("<|begin_of_thought|>hm<|end_of_thought|><|begin_of_solution|>yes<|end_of_solution|>", "yes"),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "yes"),
        ("<|inner_prefix|>hm<|inner_suffix|>yes", "yes"),
        ("<|channel>thought\nhm<channel|>yes", "yes"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>", "yes"),
        ("analysisThe user asks.assistantfinalyes", "yes"),
        ("Here is my thought process: hm\nHere is my response: yes", "yes"),
        ("it asks whether\n</think>\n\nyes", "yes"),  # the template has written the opening tag
        ("hm[/THINK]yes", "yes"),
        ("<think>one</think>\n<think>two</think>yes", "yes"),
        ("<think>the tag <think> opens <think>in</think> and</think>yes", "yes"),
        ('<think>it writes "</think>" and goes on</think>yes', "yes"),
        ("<|im_start|>assistant\n<think>hm</think>yes", "yes"),
        ("Sure.\n<think>hm</think>\nyes", "Sure.\n\nyes"),
        ('<think>```python\nx = 1\n</think>{"a": 1}', '{"a": 1}'),
    ],
)
def test_thoughts_are_taken_out(text, answer):
    assert split_thoughts(text) == Split(answer, thoughts=True, whole=True)


@pytest.mark.parametrize(
    "text",
    [
        "<think>it goes on", "<think>", "[THINK]it", "<think>hm</think>", "<think>hm</think>\n\n ", "hm</think>",
        "<|channel|>analysis<|message|>hm", "analysisThe user", "Sure.\n<think>hm", "<think>a</thinking>b",
        "Here is my thought process: hm",
    ],
)  # fmt: skip
def test_thoughts_without_an_answer_leave_none(text):
    assert split_thoughts(text) == NOTHING


@pytest.mark.parametrize(
    "text",
    [
        "",
        " yes ",
        "1 < 2 and 3 > 2",
        "I think so",
        "Write <think> and </think> around it.",
        "`</think>` ends thoughts.",
        "```\n<think>\nhm\n</think>\n```",
        'split("</think>")[1]',
        "So <thought>x</thought> is XML",
        "analysis of this",
        "Use\n<thought>as a tag\nhere",
        "[think] [/x]",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert split_thoughts(text) == Split(text, thoughts=False, whole=True)


def test_a_prompt_that_opens_thoughts():
    assert ends_open("<|im_start|>assistant\n<think>\n")
    assert not ends_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not ends_open("")
    assert split_thoughts("hm</think>yes", opened=True).answer == "yes"
    assert split_thoughts("cut by the limit", opened=True) == NOTHING
    assert [is_marker(t) for t in ("[THINK]", "[/THINK]", "<|channel|>", "</think>", "<|im_end|>", "think")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "part", ["</think>", "<think>", "a<think>", "<think>x</think>", "\n<think>`</think>`", "<think "]
)
def test_time_does_not_grow_with_the_square(part):
    started = time.monotonic()
    split_thoughts(part * 40_000)
    assert time.monotonic() - started < 10, "about 0.3 s on a quiet machine, minutes when it is quadratic"
