"""In a profile: the folder of a tokenizer is known by its contents, and a plan foretells the student."""

from __future__ import annotations

import json
import shutil

import pytest

from compress.errors import ModelError
from compress.estimates import estimate
from compress.model.checkpoint import read_config
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.cross_tokenizer.shapes import scratch_config, tokenizer_size
from compress.model.shapes import parameter_count
from compress.plans import plan
from compress.profile import load_profile
from compress.store import Store
from tests.model.distillation.cross_tokenizer import tokenizers_here as made
from tests.tiny import tiny_checkpoint, tiny_conversations

PROFILE = """\
edgestill: 1
name: other-tokenizer
teacher: teacher
data: {pool: pool.jsonl}
steps:
  - model.distillation: {method: cross_tokenizer, init: scratch, tokenizer: TOKENIZER, layers: 1, steps: 10}
export: null
bench: null
"""


@pytest.fixture
def folder(tmp_path):
    tiny_checkpoint(tmp_path / "teacher", layers=2)
    for name, merges in (("bytes", 0), ("longer", 40)):
        made.save(made.byte_level(merges), tmp_path / name)
    shutil.copytree(tmp_path / "bytes", tmp_path / "copy")
    lines = [json.dumps({"messages": talk}) + "\n" for talk in tiny_conversations(10)]
    (tmp_path / "pool.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def planned(folder, tokenizer):
    path = folder / "profile.yaml"
    path.write_text(PROFILE.replace("TOKENIZER", tokenizer), encoding="utf-8")
    return plan(load_profile(path), store=Store(folder / "store"))


def test_the_key_holds_what_is_in_the_folder_and_not_where_it_is(folder):
    keys = {name: planned(folder, name).nodes[-1].key for name in ("bytes", "copy", "longer")}
    assert keys["bytes"] == keys["copy"] != keys["longer"]
    node = planned(folder, "bytes").nodes[-1]
    assert node.params.tokenizer == str(folder / "bytes"), "a relative path starts at the profile's folder"
    assert str(folder) not in json.dumps(node.facts)


def test_a_folder_without_a_tokenizer_is_refused_before_the_run(folder):
    with pytest.raises(ModelError, match="no such folder; expected the folder of a fast tokenizer"):
        planned(folder, "absent")
    (folder / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer\.json in it"):
        planned(folder, "empty")


def test_a_plan_foretells_the_student(folder):
    params = CrossTokenizerParams(init="scratch", tokenizer=str(folder / "bytes"), layers=1, max_tokens=900)
    config = scratch_config(read_config(folder / "teacher"), params)
    assert (config["vocab_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (259, 1, 900)
    found = estimate(planned(folder, "bytes")).figures["student parameters"]
    assert found == (parameter_count(config), "parameters")


def test_an_unreadable_tokenizer_is_refused(tmp_path):
    for text in ("{", "[]", '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=r"tokenizer\.json: (cannot be read|a JSON list|no model.vocab)"):
            tokenizer_size(tmp_path)
