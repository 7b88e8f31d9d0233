"""The decoder: the library's own states, whatever was read before, at once or set back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.model.distillation.decoding import Decoder
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

LENGTHS = (3, 7, 1, 5)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (len(LENGTHS), 12), generator=generator)


def expected(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def started(model, ids, vocab=VOCAB):
    decoder = Decoder(model, rows=len(ids), slots=24, vocab=vocab)
    decoder.start(ids, torch.tensor(LENGTHS))
    return decoder


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_any_length_continue_as_in_the_library(arch):
    model, ids = tiny_model(arch, seed=1, scale=0.3), rows()
    decoder = started(model, ids)
    rest = torch.stack([ids[i, n - 1 : n + 4] for i, n in enumerate(LENGTHS)])
    found = torch.cat([decoder.logits(decoder.read(rest[:, :1])), decoder.logits(decoder.read(rest[:, 1:]))], dim=1)
    for i, length in enumerate(LENGTHS):
        wanted = expected(model, ids[i, : length + 4])[length - 1 :]
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=2e-4)


def test_what_was_set_back_is_forgotten():
    model, ids = tiny_model(seed=1, scale=0.3), rows()
    decoder = started(model, ids)
    decoder.read(torch.full((len(LENGTHS), 6), 9))
    decoder.at = torch.tensor(LENGTHS) - 1
    last = torch.stack([ids[i, n - 1 : n] for i, n in enumerate(LENGTHS)])
    found = decoder.logits(decoder.read(last))[:, 0]
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(found[i], expected(model, ids[i, :length])[-1], rtol=1e-4, atol=2e-4)


def test_rows_can_be_dropped():
    model, ids = tiny_model(seed=1, scale=0.3), rows()
    decoder = started(model, ids)
    decoder.select(torch.tensor([3, 1]))
    found = decoder.logits(decoder.read(torch.stack([ids[3, 4:5], ids[1, 6:7]])))[:, 0]
    torch.testing.assert_close(found[0], expected(model, ids[3, :5])[-1], rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found[1], expected(model, ids[1, :7])[-1], rtol=1e-4, atol=2e-4)


def test_padded_vocabulary_has_no_logit():
    decoder = started(tiny_model(seed=1, vocab=VOCAB + 16), rows())
    assert decoder.logits(decoder.read(torch.ones(4, 1, dtype=torch.int64))).shape == (4, 1, VOCAB)


def test_sliding_window():
    model, ids = tiny_model("qwen2", seed=1, scale=0.3), rows()
    whole = expected(model, ids[1])
    model.config.layer_types = ["sliding_attention", "full_attention"]
    model.config.sliding_window = 3
    model.model.has_sliding_layers = True
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        layer.attention_type = layer.self_attn.layer_type = kind
        layer.self_attn.sliding_window = 3 if kind == "sliding_attention" else None
    wanted = expected(model, ids[1])
    assert not torch.allclose(whole, wanted, atol=1e-2)
    decoder = Decoder(model, rows=1, slots=12, vocab=VOCAB)
    found = torch.cat([decoder.read(ids[1:2, :4]), decoder.read(ids[1:2, 4:])], dim=1)
    torch.testing.assert_close(decoder.logits(found)[0], wanted, rtol=1e-4, atol=2e-4)


def test_adapters_are_heard():
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2.0 * super().forward(states)

    model, ids = tiny_model(seed=1, scale=0.3), rows()
    plain = expected(model, ids[0])
    model.model.layers[0].self_attn.v_proj.__class__ = Doubled
    wanted = expected(model, ids[0])
    assert not torch.allclose(plain, wanted, atol=1e-2)
    decoder = Decoder(model, rows=1, slots=12, vocab=VOCAB)
    torch.testing.assert_close(decoder.logits(decoder.read(ids[:1]))[0], wanted, rtol=1e-4, atol=2e-4)
