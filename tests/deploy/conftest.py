"""Checkpoints and bundles that several files of these tests look at, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.export.stage import export
from deploy.params import ExportParams
from deploy.targets import load_target
from tests.deploy.tools import context, rounded
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in fp32."""
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "llama", hidden=64, head_dim=16)


@pytest.fixture(scope="session")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits, its embedding in 8."""
    return rounded(plain, tmp_path_factory.mktemp("quantized") / "llama", bits=4, group_size=32)


@pytest.fixture(scope="session")
def bundle(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the quantized model."""
    ctx = context(
        "deploy.export.bundle",
        tmp_path_factory.mktemp("bundle") / "llama",
        inputs={"model": quantized},
        target=load_target("x86-laptop-avx2"),
    )
    export(ExportParams(), ctx)
    return ctx.out
