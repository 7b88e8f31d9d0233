"""Weights cut up over processes: the curve of one process, half of the bytes in each, one kind of checkpoint."""
from __future__ import annotations

import dataclasses
import numpy as np
import pytest
import torch

from tests.model.distillation.test_parallel import SETTINGS, TOLERANCE, curve, near, run

def test_curve(context):
    alone, two = context("one"), context("two", processes=2, sharding="full")
    student, report = run(alone)
    other, told_of = run(two)
    print(np.abs(curve(alone) - curve(two)).max())
    assert np.abs(curve(alone) - curve(two)).max() < TOLERANCE
    assert near(student, other)
