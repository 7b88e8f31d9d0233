"""Peak memory: flat in the vocabulary, and less of it where layers are computed twice."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.model.distillation.forward import kept_states
from compress.model.distillation.params import LogitsParams
from tests.model.distillation.test_parallel import SETTINGS, curve, run
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[3]
POSITIONS, WIDTH = 2048, 32
MIB = 1 << 20

PEAK = """
import sys, torch
torch.set_num_threads(1)
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
"""
LOSS = (
    PEAK
    + f"""
from compress.model.distillation.losses import LossWeights, Sparse, fused_loss
def once(vocab, positions):
    torch.manual_seed(0)
    hidden = torch.randn(positions, {WIDTH}, requires_grad=True)
    head = torch.randn(vocab, {WIDTH}, requires_grad=True)
    logprobs = torch.randn(positions, 9).log_softmax(-1)
    ids = torch.arange(8).repeat(positions, 1)
    aim = Sparse(ids, logprobs[:, :8].contiguous(), logprobs[:, 8].contiguous())
    loss = fused_loss(hidden, head, torch.zeros(positions, dtype=torch.int64), aim, LossWeights(kd_weight=0.5)).loss
    loss.backward()
once(2048, 64)
before = status("VmRSS:")
once(int(sys.argv[1]), {POSITIONS})
print(status("VmHWM:") - before)
"""
)
LAYERS = (
    PEAK
    + """
from compress.model.distillation.forward import kept_states
from tests.tiny import tiny_model
model = tiny_model(layers=12, hidden=64, ffn=256)
def once(rows):
    ids = torch.randint(0, 300, (rows, 64))
    states = kept_states(model, ids, torch.arange(rows * 64), recompute=sys.argv[1] == "True")
    states.sum().backward()
once(1)
before = status("VmRSS:")
once(64)
print(status("VmHWM:") - before)
"""
)


def peak(script: str, argument: object) -> int:
    """Bytes that a fresh process needed at the most beyond what it held before."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", script, str(argument)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True, text=True, timeout=100)
    return int(done.stdout.split()[-1])


def test_peak_memory_is_flat_in_the_vocabulary():
    """The whole matrix of logits would be 1.2 GiB in fp32; the head, its gradients and one copy are let off."""
    small, large = 2048, 152_064
    head = (large - small) * WIDTH * 4
    growth = peak(LOSS, large) - peak(LOSS, small)
    print(f"{growth / MIB:.0f} MiB more, {head / MIB:.0f} MiB of them each copy of the head")
    assert growth - 3 * head < 16 * MIB
    assert (large - small) * POSITIONS * 4 > 1000 * MIB


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_layers_computed_twice_give_the_same_gradients(arch):
    ids, found = torch.arange(60).reshape(3, 20), []
    for recompute in (False, True):
        model = tiny_model(arch, layers=3)
        states = kept_states(model, ids, torch.arange(0, 60, 2), recompute=recompute)
        states.square().sum().backward()
        found.append([states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_computed_twice_give_the_same_curve(context):
    plain, twice = context("plain"), context("twice")
    run(plain)
    run(twice, dataclasses.replace(SETTINGS, activation_checkpointing=True))
    assert np.array_equal(curve(plain), curve(twice))


def test_layers_computed_twice_need_less_memory():
    plain, twice = peak(LAYERS, False), peak(LAYERS, True)
    print(f"{plain / MIB:.0f} MiB, computed twice {twice / MIB:.0f} MiB")
    assert twice < 0.6 * plain


def test_what_compares_layers_keeps_them():
    with pytest.raises(ValueError, match="activation_checkpointing"):
        LogitsParams(hidden_weight=1.0, targets="online", activation_checkpointing=True)
