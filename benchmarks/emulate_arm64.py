"""The same bundle here and on emulated 64-bit Arm cores: are the tokens the same, and how far apart are the logits?

    python -m benchmarks.emulate_arm64                 # the embedded teacher, rounded to 4 bits, exported two ways
    python -m benchmarks.emulate_arm64 BUNDLE          # a bundle of yours

qemu translates one program at a time (user mode), so that neither root nor a chroot is needed: Debian's arm64 Python
is unpacked by apt-get and dpkg-deb into ``build/arm64``, the aarch64 wheels of the runtime, in the versions that are
installed here, go beside it. Each core of `CORES` runs the project's own `deploy.runners` under it. Needs Debian or
Ubuntu with a package source that has arm64, and the network the first time. Says nothing of speed. Exit code 1 when
tokens differ where they must not, 2 when it cannot run here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "profiles" / "quickstart"
PACKAGES = ("onnxruntime", "onnxruntime-genai", "numpy")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
SYSTEM = ("python3", "libstdc++6")  # Debian packages; apt adds what they need
QEMU = ("qemu-aarch64-static", "qemu-aarch64")


@dataclass(frozen=True)
class Core:
    """A core that qemu knows, and what Linux on it says of itself."""

    qemu: str
    part: str  # Arm's number of it: main ID register, bits 15 to 4
    features: str
    device: str


# Without asimddp the runtime has no int8 kernel for MatMulNBits and computes in fp32, whatever the accuracy level.
CORES = (
    Core("cortex-a72", "0xd08", "fp asimd evtstrm crc32 cpuid", "Raspberry Pi 4"),
    Core(
        "cortex-a76",
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        "Raspberry Pi 5",
    ),
)


class NotHere(Exception):
    """What keeps this machine from emulating."""


class Failed(Exception):
    """The runtime ended without an answer: what this benchmark is there to find."""


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Standard output of a command; its last line of complaint as `NotHere` when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise NotHere(f"{Path(command[0]).name} failed: {told[-1]}")
    return done.stdout


def apt(folder: Path, architecture: str, *arguments: str) -> None:
    """apt-get with state of its own: the system's package lists and packages are neither used nor changed."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    run(
        [
            *("apt-get", "-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
            *("-o", f"Dir::State={folder / 'state'}", "-o", f"Dir::State::status={folder / 'status'}"),
            *("-o", f"Dir::Cache={folder / 'cache'}", "-o", "APT::Sandbox::User="),
            *arguments,
        ],
        cwd=folder,
    )


def unpack(folder: Path, into: Path) -> None:
    """Unpack every Debian package of ``folder``; nothing of them is run."""
    for package in sorted(folder.glob("*.deb")):
        run(["dpkg-deb", "-x", package, into])


def emulator(work: Path) -> Path:
    """qemu's program for aarch64: the system's, else unpacked into ``work`` (it is static, so that it just runs)."""
    for name in QEMU:
        if found := shutil.which(name):
            return Path(found)
    place = work / "qemu" / "usr" / "bin" / QEMU[0]
    if not place.is_file():
        host = run(["dpkg", "--print-architecture"]).strip()
        apt(work / "apt-qemu", host, "update")
        apt(work / "apt-qemu", host, "download", "qemu-user-static")
        unpack(work / "apt-qemu", work / "qemu")
    if not place.is_file():
        raise NotHere("no qemu-aarch64-static: apt-get install qemu-user-static")
    return place


def arm_root(work: Path) -> tuple[Path, Path]:
    """A root folder with an arm64 Python and the runtime, made once; the folder and the interpreter in it."""
    root, done = work / "root", work / "root.done"
    wanted = " ".join(f"{name}=={metadata.version(name)}" for name in PACKAGES)
    if not (done.is_file() and done.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(root, ignore_errors=True)
        apt(work / "apt", "arm64", "update")
        apt(work / "apt", "arm64", "install", "--yes", "--download-only", "--no-install-recommends", *SYSTEM)
        unpack(work / "apt" / "cache" / "archives", root)
        python = interpreter(root)
        platforms = [text for name in PLATFORMS for text in ("--platform", name)]
        run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
                *("--only-binary=:all:", "--python-version", python.name.removeprefix("python"), *platforms),
                *("--target", root / "site", *wanted.split()),
            ]
        )
        done.write_text(wanted, encoding="utf-8")
    return root, interpreter(root)


def interpreter(root: Path) -> Path:
    """The Python in ``root``, by its full name."""
    found = sorted((root / "usr" / "bin").glob("python3.[0-9]*"))
    if not found:
        raise NotHere(f"no Python was unpacked into {root}")
    return found[0]


def pretend(root: Path, core: Core) -> None:
    """Write what Linux says on one core of that kind; qemu would show this machine's, which crashes the runtime."""
    cpus = root / "sys" / "devices" / "system" / "cpu"
    (cpus / "cpu0" / "topology").mkdir(parents=True, exist_ok=True)
    for name in ("kernel_max", "possible", "present", "cpu0/topology/physical_package_id"):
        (cpus / name).write_text("0\n", encoding="ascii")
    (cpus / "cpu0" / "topology" / "cluster_cpus_list").write_text("0\n", encoding="ascii")
    (root / "proc").mkdir(exist_ok=True)
    lines = [
        "processor\t: 0", f"Features\t: {core.features}", "CPU implementer\t: 0x41", "CPU architecture: 8",
        "CPU variant\t: 0x0", f"CPU part\t: {core.part}", "CPU revision\t: 1",
    ]  # fmt: skip
    (root / "proc" / "cpuinfo").write_text("\n".join(lines) + "\n\n", encoding="ascii")


def own_bundles(work: Path) -> dict[str, Path]:
    """The embedded teacher in 4 bits, with 8-bit activations and in fp32 arithmetic."""
    from compress.progress import Progress
    from compress.single import Request, run_stage, stage_and_params
    from compress.stages import find
    from deploy.targets import load_target

    # what an earlier version of a stage wrote is not taken for this one's
    rounded, written = find("model.quantization", "rtn").version, find("deploy.export").version
    codes, key = work / f"codes-v{rounded}", f"v{rounded}.{written}"
    bundles = {f"int4, accuracy level {level}": work / f"bundle-{level}-{key}" for level in (4, 0)}
    if not codes.is_dir():
        stage, params = stage_and_params("model.quantization.rtn", ["bits=4", "group_size=32", "embedding_bits=8"])
        run_stage(Request(stage, params, {"model": QUICKSTART / "teacher"}, codes, threads=1), Progress(quiet=True))
    for level, folder in zip((4, 0), bundles.values(), strict=True):
        if not folder.is_dir():
            stage, params = stage_and_params("deploy.export", [f"accuracy_level={level}"])
            target = load_target("raspberry-pi-5")
            run_stage(Request(stage, params, {"model": codes}, folder, target=target), Progress(quiet=True))
    return bundles


def prompts(bundle: Path, count: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of the first ``count`` requests of the quickstart's test, and the tokens that end an answer."""
    from compress.encoding import encode_prompt, encode_text_prompt, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(bundle)
    lines = (QUICKSTART / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["prompt"] for line in lines]
    if tokenizer.chat_template:
        encoded = [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    else:
        encoded = [encode_text_prompt(text, tokenizer) for text in texts]
    return encoded, list(stop_ids(tokenizer))


def answer(request: dict[str, Any]) -> None:
    """What runs on either side: greedy answers, and the logits of the prompts; imports nothing but the runtime."""
    from deploy.runners import GenaiRunner

    runner = GenaiRunner(Path(request["bundle"]), threads=1)
    answers = runner.generate(request["prompts"], request["new_tokens"], request["stop"])
    logits = np.concatenate([runner.logits(ids) for ids in request["prompts"]])
    out = Path(request["out"])
    np.save(out.with_suffix(".npy"), logits, allow_pickle=False)
    out.write_text(json.dumps({"machine": platform.machine(), "answers": answers}), encoding="utf-8")


def answered(command: Sequence[str | Path], request: dict[str, Any], name: str, work: Path) -> tuple[Any, Any]:
    """Answers (lists of ids) and logits (positions, vocabulary) of ``request``, run by ``command``."""
    out, asked = work / f"{name}.json", work / "request.json"
    asked.write_text(json.dumps(request | {"out": str(out)}), encoding="utf-8")
    try:
        run([*command, Path(__file__).resolve(), "--answer", asked], env=os.environ | {"PYTHONPATH": str(ROOT)})
    except NotHere as error:
        raise Failed(f"{request['bundle']} on {name}: {error}") from error
    return json.loads(out.read_text(encoding="utf-8"))["answers"], np.load(out.with_suffix(".npy"))


def compare(bundles: dict[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each bundle and core: equal answers, equal tokens, largest difference of a logit."""
    work: Path = args.work
    qemu, (root, python) = emulator(work), arm_root(work)
    rows = []
    for label, bundle in bundles.items():
        ids, stop = prompts(bundle, args.prompts)
        request = {"bundle": str(bundle.resolve()), "prompts": ids, "stop": stop, "new_tokens": args.new_tokens}
        here, logits = answered([sys.executable], request, "here", work)
        for core in CORES:
            pretend(root, core)
            paths = f"PYTHONPATH={root / 'site'}:{ROOT}"
            command = [qemu, "-L", root, "-cpu", core.qemu, "-E", paths, python]
            there, other = answered(command, request, core.qemu, work)
            pairs = [(a, b) for one, two in zip(here, there, strict=True) for a, b in zip(one, two, strict=False)]
            rows.append(
                {
                    "bundle": label,
                    "core": core.qemu,
                    "device": core.device,
                    "answers": len(here),
                    "equal_answers": sum(a == b for a, b in zip(here, there, strict=True)),
                    "tokens": sum(map(len, here)),
                    "equal_tokens": sum(a == b for a, b in pairs),
                    "logit_difference": float(np.abs(logits - other).max() / np.abs(logits).max()),
                    "same_choice": float((logits.argmax(-1) == other.argmax(-1)).mean()),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle; left out: the embedded teacher in 4 bits")
    parser.add_argument("--prompts", type=int, default=12, help="how many requests are answered")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "arm64", help="where all of it is kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)  # the run under the emulator
    args = parser.parse_args()
    if args.answer:
        answer(json.loads(args.answer.read_text(encoding="utf-8")))
        return 0
    args.work = args.work.resolve()
    try:
        for tool in ("apt-get", "dpkg-deb"):
            if not shutil.which(tool):
                raise NotHere(f"there is no {tool}; this takes Debian or Ubuntu")
        args.work.mkdir(parents=True, exist_ok=True)
        bundles = {args.bundle.name: args.bundle} if args.bundle else own_bundles(args.work)
        rows = compare(bundles, args)
    except Failed as error:
        print(f"emulate-arm64: no answer: {error}", file=sys.stderr)
        return 1
    except NotHere as error:
        print(f"emulate-arm64: not possible here: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return int(any(row["equal_answers"] < row["answers"] for row in rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'bundle':24}{'core':12}{'as in':18}{'answers':>9}{'tokens':>11}{'logits apart':>14}{'same choice':>13}"]
    for row in rows:
        answers = f"{row['equal_answers']}/{row['answers']}"
        tokens = f"{row['equal_tokens']}/{row['tokens']}"
        lines.append(
            f"{row['bundle'][:23]:24}{row['core']:12}{row['device']:18}{answers:>9}{tokens:>11}"
            f"{row['logit_difference']:>14.1e}{row['same_choice']:>13.2%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
