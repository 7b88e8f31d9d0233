"""Targets: every built-in one is read and plausible; a wrong file is refused by file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.errors import TargetError
from deploy.targets import Target, built_in_targets, list_targets, load_target, unlike


@pytest.mark.parametrize("name", list_targets())
def test_built_in_targets_are_read_and_plausible(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert 0.3 < target.usable_memory_bytes / target.memory_bytes < 1
    assert 1e9 < target.read_bytes_per_s < target.memory_bandwidth_bytes_per_s < 1e12
    assert 1e9 < target.flops_per_s < target.fp32_flops_per_s < 1e14
    assert target.storage_read_bytes_per_s < target.memory_bandwidth_bytes_per_s


def test_the_promised_targets_are_there_with_their_sources() -> None:
    assert set(list_targets()) == {
        "android-arm64", "iphone-arm64", "jetson-orin-nano", "raspberry-pi-4", "raspberry-pi-5", "wasm-browser",
        "x86-avx512-vnni", "x86-laptop-avx2",
    }  # fmt: skip
    for name in list_targets():
        text = (built_in_targets() / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.count("# http") + text.count(": http") >= 3, f"{name}: figures without their source"


def test_every_figure_stands_under_a_comment_that_says_where_it_is_from() -> None:
    for name in list_targets():
        block: list[str] = []  # lines since the last empty one
        for line in (built_in_targets() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
            block = [*block, line] if line else []
            figure = line.partition(":")[0].endswith(("_s", "_bytes", "cores", "isa", "_efficiency", "_seconds"))
            if figure and not line.startswith(" "):
                assert any(other.startswith("#") for other in block), f"{name}: {line}"


def test_where_the_bundles_own_runner_cannot_run_the_target_says_so() -> None:
    said = {name: " ".join(load_target(name).notes) for name in list_targets()}
    assert "there is no onnxruntime-genai for browsers" in said["wasm-browser"]
    assert "iOS runs no Python" in said["iphone-arm64"]
    assert "Android has no Python wheel" in said["android-arm64"]
    assert said["raspberry-pi-4"] == said["raspberry-pi-5"] == ""
    assert [name for name in said if load_target(name).runtime != "onnxruntime-genai"] == ["wasm-browser"]


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"got 'raspbery-pi-5'.*raspberry-pi-5.*Did you mean 'raspberry-pi-5'\?"):
        load_target("raspbery-pi-5")
    with pytest.raises(TargetError, match=r"nowhere/board.yaml: no such file"):
        load_target("nowhere/board.yaml")


def _changed(tmp_path: Path, old: str, new: str) -> Path:
    text = (built_in_targets() / "raspberry-pi-5.yaml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "board.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores: 4\n", "cores: 0\n", r"board.yaml:\d+: cores: .*greater than or equal to 1 \(got 0\)"),
        ("cores: 4\n", "core: 4\n", r"board.yaml:\d*:? ?cor"),
        ("cores: 4\n", "cores: four\n", r"board.yaml:\d+: cores: .*valid integer \(got 'four'\)"),
        ("cores: 4\n", "cores: 4\ncorse: 4\n", r"board.yaml:\d+: corse: .*Did you mean 'cores'\?"),
        ("cores: 4\n", "cores: 4\ncores: 8\n", r"board.yaml:\d+: cores: the key is given twice"),
        ("usable_memory_bytes: 6000000000", "usable_memory_bytes: 9000000000", r"usable_memory_bytes 9000000000"),
        ("runtime: onnxruntime-genai", "runtime: llamacpp", r"board.yaml:\d+: runtime: .*'onnxruntime-genai'"),
    ],
)
def test_a_wrong_target_file_is_refused_by_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target(_changed(tmp_path, old, new))


def test_a_users_file_is_read(tmp_path: Path) -> None:
    target = load_target(_changed(tmp_path, "cores: 4\n", "cores: 2\n"))
    assert isinstance(target, Target)
    assert target.cores == 2


def test_a_machine_that_is_not_the_target_is_told_from_it() -> None:
    target = load_target("x86-laptop-avx2")
    sets = ["sse4_2", "avx", "f16c", "avx2", "fma"]
    laptop = {"cpu": "Intel(R) Core(TM) i5-10210U CPU @ 1.60GHz", "cores": 4, "instruction_sets": sets,
              "system": "Linux x86_64"}  # fmt: skip
    assert unlike(target, laptop) == []
    assert unlike(target, laptop | {"cpu": "AMD EPYC", "cores": 2}) == [
        "it has 2 usable cores, not 4", "its processor is AMD EPYC, not Intel Core i5-10210U"
    ]  # fmt: skip
    assert unlike(target, laptop | {"instruction_sets": sets[:3]}) == ["it lacks fma, avx2"]
    board = {"cpu": "Raspberry Pi 5 Model B Rev 1.0", "cores": 4, "instruction_sets": ["asimd", "asimdhp", "asimddp"],
             "system": "Linux aarch64"}  # fmt: skip
    assert unlike(load_target("raspberry-pi-5"), board) == []
    assert unlike(load_target("raspberry-pi-5"), board | {"cpu": "aarch64"}) == []  # a board that does not say
    fifty = board | {"cpu": "Raspberry Pi 50"}
    assert len(unlike(load_target("raspberry-pi-5"), fifty)) == 1
    phone = {"cpu": "Qualcomm Technologies, Inc SM8550", "cores": 8, "system": "Linux aarch64",
             "instruction_sets": ["asimd", "asimdhp", "asimddp", "i8mm", "bf16"]}  # fmt: skip
    assert unlike(load_target("android-arm64"), phone) == []
    assert len(unlike(load_target("android-arm64"), phone | {"cpu": "Qualcomm SM8250 at 2.8"})) == 1  # 8 and 2 are none
    assert unlike(target, board)[0] == "it is aarch64, not x86_64"
