"""The short forward pass: the library's values and gradients for each architecture, and its own way for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.model.distillation import forward
from compress.model.distillation.forward import is_plain, kept_states
from compress.model.distillation.packing import RowTable
from tests.tiny import VOCAB, tiny_config, tiny_model, tiny_token_rows

ROWS = tiny_token_rows(40, tokens=(2, 9, 17, 30))
SHAPES = [
    {"tied": True},
    {"tied": False, "kv_heads": 4},
    {"heads": 4, "kv_heads": 1, "head_dim": 16, "layers": 1},
]


def library(model, batch):
    """Hidden states by the library, row by row, without padding."""
    states = []
    table = RowTable(ROWS, vocab=VOCAB)
    for row in batch.rows:
        one = table.batch(np.array([int(row)]))
        whole = model.model(input_ids=one.input_ids, attention_mask=torch.ones_like(one.input_ids), use_cache=False)
        states.append(whole.last_hidden_state[0, one.keep])
    return torch.cat(states)


def short(model, batch):
    return kept_states(model, batch.input_ids, batch.keep)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_library(arch, shape):
    model = tiny_model(arch, scale=0.3, **shape)
    assert is_plain(model)
    batch = RowTable(ROWS, vocab=VOCAB).batch(np.array([3, 0, 2, 13]))
    outer = torch.randn(len(batch.keep), 32, generator=torch.Generator().manual_seed(0))
    found = []
    for way in (library, short):
        model.zero_grad()
        states = way(model, batch)
        states.backward(outer)
        found.append((states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (expected, wanted), (states, gradients) = found
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_attention_and_feed_forward_biases_are_used():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    batch = RowTable(ROWS, vocab=VOCAB).batch(np.array([3, 0, 2, 13]))
    torch.testing.assert_close(
        kept_states(model, batch.input_ids, batch.keep), library(model, batch), rtol=1e-4, atol=1e-5
    )


def unusual(name):
    """A model that the short way does not cover."""
    if name == "window":
        config = tiny_config("qwen3")
        config.use_sliding_window, config.sliding_window = True, 4
        config.layer_types = ["full_attention", "sliding_attention"]
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = tiny_model()
    if name == "dropout":
        model.config.attention_dropout = 0.1
    elif name == "eager":
        model.config._attn_implementation = "eager"
    elif name == "hook":
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    elif name == "adapter":
        model.model.layers[1].self_attn.v_proj = torch.nn.Sequential(model.model.layers[1].self_attn.v_proj)
    return model


@pytest.mark.parametrize("name", ["dropout", "eager", "window", "hook", "adapter"])
def test_models_that_are_not_plain_go_the_librarys_way(monkeypatch, name):
    model = unusual(name)
    assert not is_plain(model)

    def never(*_):
        raise AssertionError("the short way was taken")

    monkeypatch.setattr(forward, "_decoder", never)
    batch = RowTable(ROWS, vocab=VOCAB).batch(np.array([3, 0, 2, 13]))
    torch.testing.assert_close(
        kept_states(model, batch.input_ids, batch.keep), library(model, batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_long_rows_go_through_the_fused_kernel_with_the_same_values_and_gradients(arch, monkeypatch):
    model = tiny_model(arch, scale=0.3)
    batch = RowTable(ROWS, vocab=VOCAB).batch(np.array([3, 0, 2, 13]))
    outer = torch.randn(len(batch.keep), 32, generator=torch.Generator().manual_seed(0))
    found = []
    for limit in (128, 0):
        monkeypatch.setattr(forward, "SHORT", limit)
        model.zero_grad()
        states = kept_states(model, batch.input_ids, batch.keep)
        states.backward(outer)
        found.append([states.detach(), *(p.grad.clone() for p in model.parameters())])
    for short, long in zip(*found, strict=True):
        torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-4 * float(short.abs().max()))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_bf16_products_stay_near_fp32(arch):
    """Each gradient points where the exact one does; bf16 keeps 8 bits, so that a few per cent are what it can."""
    model = tiny_model(arch, scale=0.3)
    batch = RowTable(ROWS, vocab=VOCAB).batch(np.array([3, 0, 2, 13]))
    outer = torch.randn(len(batch.keep), 32, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        states = kept_states(model, batch.input_ids, batch.keep, dtype=dtype)
        assert states.dtype == torch.float32
        states.backward(outer)
        found.append([states.detach(), *(p.grad.clone() for p in model.parameters())])
    for exact, rounded in zip(*found, strict=True):
        assert not torch.equal(exact, rounded)
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99
