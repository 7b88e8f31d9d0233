#!/usr/bin/env python3
"""Runs the bundle that it lies in: answers a text, chats, measures speed, checks the files.

    python run.py "turn on the light"    one answer, as it comes; --raw: the text as it is, without the chat template
                                         exit code 4: it calls a function that the table in bundle.json does not hold
    python run.py --chat                 a conversation
    python run.py --bench                one line of JSON: speed, memory; energy and temperature where the device tells
    python run.py --check                SHA-256 of every file against bundle.json
    python run.py --serve                requests as lines of JSON on standard input, a line of JSON to each (`Service`)

Needs onnxruntime-genai and numpy alone. It is copied into every bundle as it stands here, and `edgestill bench` runs
this same file, here and on a device: there is one way of measuring. Settings are those of the command line, else of
``tuned`` in bundle.json, else of genai_config.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not os.environ.get("ORT_DISABLE_TELEMETRY"):  # the runtime reads it when it is loaded
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
BUNDLE_FILE, GENAI_CONFIG = "bundle.json", "genai_config.json"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
READ_BYTES, READ_REPEATS = 256 << 20, 7  # much larger than any cache
VECTOR = re.compile(r"sse4|avx|fma$|f16c|amx|neon|asimd|sve|i8mm|bf16")  # instruction sets that a record names
# Options of a session that open nothing: another one, such as custom_ops_library, may load code out of the bundle.
OPTIONS = {
    *("intra_op_num_threads", "inter_op_num_threads", "log_id", "log_severity_level", "log_verbosity_level"),
    *("graph_optimization_level", "enable_cpu_mem_arena", "enable_mem_pattern", "session.disable_prepacking"),
    *("session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.intra_op_thread_affinities"),
}
BATCH, BATCH_BYTES = 32, 256 << 20  # answers that run together, at most, and the bytes of their keys and values
NO_SUCH_FUNCTION = 4  # exit code of an answer that calls what the device does not have
MOST_NEW_TOKENS = 256  # of an answer, where nothing is said
ROOM = 512  # tokens of an answer that a KV cache has room for at first, where more are allowed
NO_TOKEN = -1  # a padding token that no prompt has: the runtime would hide its positions
COLD = "the device offers no temperature in hwmon or thermal zones"
AFFINITIES = "session.intra_op_thread_affinities"  # the runtime refuses any other count of places than of threads
# A counter of energy moves every millisecond, a battery's gauge every second or so: of less time they tell nothing.
SHORTEST_S = {"rapl": 0.05, "battery": 5.0}


class Fault(Exception):
    """What the user reads instead of a traceback; it ends with exit code ``code``."""

    code = 1


class Refused(Fault):
    """The bundle asks for what no bundle may do."""

    code = 2


def forbidden(text: str) -> str:
    """What a runtime's configuration asks for that no bundle may do: other `OPTIONS`, files elsewhere; "" for nothing.

    The whole document is walked. A key that comes twice is refused, since the runtime may read the other one. Raises
    ValueError when it is no JSON.
    """
    found: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        found.extend(f"the key {name!r} comes twice" for name in sorted(set(names)) if names.count(name) > 1)
        for name, value in pairs:
            if name == "session_options":
                found.extend(strange_options(value))
            elif name.endswith("filename") and (not isinstance(value, str) or re.search(r"[/\\:\0]|^\.*$", value)):
                found.append(f"{name} {value!r} is no plain file name")
        return dict(pairs)

    json.loads(text, object_pairs_hook=once)
    return found[0] if found else ""


def strange_options(options: Any) -> list[str]:
    """What a table of session options holds beside `OPTIONS` and the CPU as the provider."""
    if not isinstance(options, dict):
        return ["session_options is no table"]
    plain: tuple[Any, ...] = ([], {}, None, [{"cpu": {}}], [{"CPU": {}}], ["cpu"], ["CPU"])
    found = [] if options.get("provider_options") in plain else ["session_options has a provider other than the CPU"]
    strange = sorted(set(options) - OPTIONS - {"provider_options"})
    return found + [f"session_options has the key {name!r}, which may load code" for name in strange]


def check_config(path: Path) -> None:
    """Raise Refused when the runtime's configuration in ``path`` is `forbidden`, Fault when it cannot be read."""
    try:
        reason = forbidden(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(f"{path}: cannot be read ({error}). Copy the bundle again") from error
    if reason:
        raise Refused(f"{path}: {reason}. Do not open this bundle unless you know why it asks for that")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; Fault when it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"{path}: cannot be read ({error}). Copy the bundle again") from error
    if not isinstance(found, dict):
        raise Fault(f"{path}: not a JSON object. Copy the bundle again")
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def damaged(folder: Path, info: dict[str, Any]) -> list[str]:
    """One line for each file of ``info`` that is missing or altered."""
    lines = []
    for name, facts in info.get("files", {}).items():
        path = folder / name
        if Path(name).name != name:
            lines.append(f"{name!r}: not a plain file name")
        elif not path.is_file():
            lines.append(f"{name}: missing")
        elif path.stat().st_size != facts["bytes"]:
            lines.append(f"{name}: {path.stat().st_size} bytes, expected {facts['bytes']}")
        elif sha256_of(path) != facts["sha256"]:
            lines.append(f"{name}: its content changed (SHA-256 differs)")
    return lines


@dataclass(frozen=True)
class Settings:
    """How the runtime is opened; ``prefill_chunk`` prompt tokens are read at once, all where it is None."""

    threads: int
    prefill_chunk: int | None = None
    config_entries: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, info: dict[str, Any], config: dict[str, Any], threads: int | None = None) -> Settings:
        """``threads`` if given, else what was tuned, else what genai_config.json says, else the physical cores."""
        tuned = info.get("tuned") or {}
        session = config.get("model", {}).get("decoder", {}).get("session_options", {})
        found = threads or tuned.get("threads") or session.get("intra_op_num_threads") or cores()
        entries = {str(name): str(value) for name, value in (tuned.get("config_entries") or {}).items()}
        if int(found) != tuned.get("threads"):
            entries.pop(AFFINITIES, None)
        return cls(int(found), tuned.get("prefill_chunk"), entries)


def processors(sys_root: Path = Path("/sys")) -> list[list[int]]:
    """Processors that this process may use, by physical core; each alone where the system does not tell cores apart."""
    found: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)):
        core = _text(sys_root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(core or str(cpu), []).append(cpu)
    return list(found.values())


def cores(sys_root: Path = Path("/sys")) -> int:
    """Physical cores that this process may use; no more than the quota of its cgroup (v2, v1) pays for, rounded up."""
    usable, group = len(processors(sys_root)), sys_root / "fs/cgroup"
    old = " ".join(_text(group / f"cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    quota = re.fullmatch(r"(\d+) (\d+)", _text(group / "cpu.max") or old)
    return min(usable, max(1, -(-int(quota[1]) // int(quota[2])))) if quota else usable


def _text(path: Path) -> str:
    """What a small file of the system says; empty when it says nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def machine() -> dict[str, Any]:
    """Facts of this machine: cpu, board, cores, memory in bytes, system, versions."""
    info = _text(Path("/proc/cpuinfo"))
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "board": _text(Path("/sys/firmware/devicetree/base/model")) or None,
        "cores": cores(),
        "instruction_sets": [flag for flag in flags[1].split() if VECTOR.match(flag)] if flags else [],
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def peak_memory_bytes() -> int | None:
    """Highest resident set of this process so far; None where the system does not tell."""
    if peak := re.search(r"^VmHWM:\s*(\d+) kB", _text(Path("/proc/self/status")), re.MULTILINE):
        return int(peak[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # macOS counts bytes, others KiB


def read_bandwidth() -> float:
    """Bytes per second of reading memory from end to end: the fastest of several dot products of a large array.

    The threads are those of numpy's linear algebra, which `bench` sets before numpy loads.
    """
    import numpy as np

    array = np.ones(READ_BYTES // 4, dtype=np.float32)
    fastest = float("inf")
    for _ in range(READ_REPEATS):
        start = time.perf_counter()
        np.dot(array, array)
        fastest = min(fastest, time.perf_counter() - start)
    return READ_BYTES / fastest


def temperatures(sys_root: Path = Path("/sys")) -> dict[str, float]:
    """Degrees Celsius by sensor, from hwmon and thermal zones; empty where there is none that can be read."""
    found = {}
    for path in sorted((sys_root / "class/hwmon").glob("hwmon*/temp*_input")):
        label = _text(path.with_name(path.name.replace("_input", "_label"))) or path.name.removesuffix("_input")
        found[f"{_text(path.parent / 'name') or path.parent.name} {label}"] = _text(path)
    for path in sorted((sys_root / "class/thermal").glob("thermal_zone*/temp")):
        found[f"{path.parent.name} {_text(path.parent / 'type')}".strip()] = _text(path)
    return {name: int(text) / 1000 for name, text in found.items() if re.fullmatch(r"-?\d+", text)}


class EnergyMeter:
    """Joules since the last reading: RAPL counters of the CPU packages, else a discharging battery's power.

    ``source`` is None, and ``reason`` says why, where the device offers neither. A battery counts the whole device,
    RAPL the packages; both with what they draw when idle.
    """

    def __init__(self, sys_root: Path = Path("/sys"), clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.reason = clock, ""
        zones = sorted((sys_root / "class/powercap").glob("intel-rapl:*"))
        self.packages = [z for z in zones if z.name.count(":") == 1 and _text(z / "name").startswith("package")]
        batteries = sorted((sys_root / "class/power_supply").glob("*"))
        self.batteries = [b for b in batteries if _text(b / "type") == "Battery" and self._watts(b) is not None]
        self.source: str | None = None
        if self.packages and all(_number(zone / "energy_uj") is not None for zone in self.packages):
            self.source = "rapl"
        elif self.batteries and all(_text(battery / "status") == "Discharging" for battery in self.batteries):
            self.source = "battery"
        elif self.batteries:
            self.reason = f"the battery is not discharging but {_text(self.batteries[0] / 'status') or 'unknown'}"
        elif self.packages:
            self.reason = f"{self.packages[0] / 'energy_uj'} cannot be read (on most systems by root alone)"
        else:
            self.reason = "the device offers no RAPL counter and no battery's power"
        self.last = self._read()

    @staticmethod
    def _watts(battery: Path) -> float | None:
        power, current, voltage = (_number(battery / f"{name}_now") for name in ("power", "current", "voltage"))
        if power is not None:
            return abs(power) / 1e6  # microwatts; some drivers count the discharge as negative
        return None if current is None or voltage is None else abs(current) * voltage / 1e12  # microamperes, microvolts

    def _read(self) -> tuple[float, list[float]]:
        if self.source == "rapl":
            return self.clock(), [_number(zone / "energy_uj") or 0 for zone in self.packages]
        if self.source == "battery":
            return self.clock(), [self._watts(battery) or 0.0 for battery in self.batteries]
        return self.clock(), []

    def joules(self) -> float | None:
        """Joules since the last call, or since the meter was made; None without a source."""
        before, self.last = self.last, (now := self._read())
        if self.source == "rapl":
            steps = [after - first for first, after in zip(before[1], now[1], strict=True)]
            whole = [_number(zone / "max_energy_range_uj") or 0 for zone in self.packages]
            return sum(step + top if step < 0 else step for step, top in zip(steps, whole, strict=True)) / 1e6
        if self.source == "battery":
            return (sum(before[1]) + sum(now[1])) / 2 * (now[0] - before[0])
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


class Runner:
    """The bundle in ``folder``, opened in onnxruntime-genai. Ends of an answer are counted here, not by the runtime.

    With ``endless`` its generators never choose an end: whatever is timed then stands in front of one.
    """

    def __init__(self, folder: Path, info: dict[str, Any], settings: Settings, *, endless: bool = False) -> None:
        check_config(folder / GENAI_CONFIG)
        if strange := strange_options(settings.config_entries):
            raise Refused(f"{folder / BUNDLE_FILE}: tuned: {strange[0]}")
        og = runtime(info)
        config_file = read_json(folder / GENAI_CONFIG)
        model = config_file["model"]
        ends, self.og, self.settings, self.folder = model.get("eos_token_id"), og, settings, folder
        self.ends, self.endless = frozenset(ends if isinstance(ends, list) else [ends]), endless
        self.context, self.vocabulary = int(model["context_length"]), int(model["vocab_size"])
        sizes = ("num_hidden_layers", "num_key_value_heads", "head_size")
        self.position_bytes = 2 * 4 * math.prod(int(model["decoder"][name]) for name in sizes)  # keys and values, fp32
        session = {"inter_op_num_threads": 1, **settings.config_entries, "intra_op_num_threads": settings.threads}
        try:
            config = og.Config(str(folder))
            given = {"pad_token_id": NO_TOKEN, "decoder": {"session_options": session}}
            config.overlay(json.dumps({"model": given if endless else {"eos_token_id": [], **given}}))
            self.model = og.Model(config)
        except RuntimeError as error:  # what the runtime raises for everything
            raise Fault(f"{folder}: onnxruntime-genai cannot open it: {str(error)[:300]}") from error

    def start(self, max_length: int, rows: int = 1) -> Any:
        """A greedy generator of ``rows`` sequences; the runtime allocates a cache of ``max_length`` positions each."""
        params, least = self.og.GeneratorParams(self.model), max_length if self.endless else 0
        params.set_search_options(
            max_length=max_length, min_length=least, do_sample=False, num_beams=1, batch_size=rows
        )
        return self.og.Generator(self.model, params)

    def prefill(self, generator: Any, ids: Any) -> None:
        """Read ``ids`` (T,), in pieces where the settings say so, or several sequences (rows, T), always at once."""
        import numpy as np

        array = np.asarray(ids, dtype=np.int32)
        array = array[0] if array.shape[0] == 1 and array.ndim == 2 else array
        step = array.shape[-1] if array.ndim == 2 else self.settings.prefill_chunk or len(array)
        for at in range(0, array.shape[-1], step):
            generator.append_tokens(array[..., at : at + step])

    def answers(self, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Continuations without their ends, at most ``most`` tokens each; Fault for a prompt that fills the context.

        Prompts of one length run together, as many as `BATCH` says, so that nothing is padded.
        """
        found: list[list[int]] = [[] for _ in prompts]
        by_length: dict[int, list[int]] = {}
        for at, ids in enumerate(prompts):
            self.check_room(ids)
            by_length.setdefault(len(ids), []).append(at)
        for length, places in by_length.items():
            steps = min(most, self.context - length)
            rows = max(1, min(BATCH, BATCH_BYTES // max(1, self.position_bytes * (length + steps))))
            for first in range(0, len(places), rows):
                self._together(places[first : first + rows], prompts, steps, found)
        return found

    def _together(
        self, places: Sequence[int], prompts: Sequence[Sequence[int]], steps: int, found: list[list[int]]
    ) -> None:
        """Add to ``found`` the continuations of the prompts at ``places``, which are equally long."""
        generator, running = self.start(len(prompts[places[0]]) + steps, len(places)), set(range(len(places)))
        self.prefill(generator, [prompts[at] for at in places])
        for _ in range(steps):
            generator.generate_next_token()
            chosen = [int(token) for token in generator.get_next_tokens()]
            running = {row for row in running if chosen[row] not in self.ends}
            for row in running:
                found[places[row]].append(chosen[row])
            if not running:
                return

    def check_room(self, ids: Sequence[int]) -> None:
        """Raise Fault where a prompt leaves no room for an answer in the context."""
        if not 0 < len(ids) < self.context:
            raise Fault(f"the prompt has {len(ids)} tokens; expected 1 to {self.context - 1}, the bundle's context")


class Dialogue:
    """One sequence that is read and continued, in a KV cache that grows with it.

    The runtime allocates the whole length that a generator is given, so it is given what is needed, and at least twice
    as much when that is not enough: what was read is then read again.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner, self.ids, self.size = runner, list[int](), 0  # positions of the cache
        self.generator: Any = None

    def read(self, ids: Sequence[int], most: int) -> None:
        """Bring the generator to have read ``ids``, with room for an answer of ``most`` tokens (or `ROOM` at first).

        What it has read of them already is not read again.
        """
        same = 0
        while same < min(len(self.ids), len(ids) - 1) and self.ids[same] == ids[same]:
            same += 1
        if self.generator is None or same == 0 or len(ids) + min(most, ROOM) > self.size < self.runner.context:
            self._open(ids, most)
            return
        if same < len(self.ids):
            self.generator.rewind_to(same)
        self.ids = list(ids)
        self.runner.prefill(self.generator, ids[same:])

    def tokens(self, most: int) -> Iterator[int]:
        """Generate until an end, ``most`` tokens or a full context; ends are not given."""
        for done in range(min(most, self.runner.context - len(self.ids))):
            if len(self.ids) == self.size:
                self._open(self.ids, most - done)
            self.generator.generate_next_token()
            self.ids.append(token := int(self.generator.get_next_tokens()[0]))
            if token in self.runner.ends:
                return
            yield token

    def _open(self, ids: Sequence[int], most: int) -> None:
        needed = len(ids) + min(most, max(ROOM, len(ids)))
        self.generator = None  # its cache is given back before there is another one
        self.size = min(self.runner.context, max(needed, 2 * self.size))
        self.generator, self.ids = self.runner.start(self.size), list(ids)
        self.runner.prefill(self.generator, ids)


def runtime(info: dict[str, Any]) -> Any:
    """The module onnxruntime_genai; Fault with the command that installs it."""
    try:
        import onnxruntime_genai
    except ImportError as error:
        version = info.get("onnx", {}).get("runtime", {}).get("onnxruntime-genai")
        package = "onnxruntime-genai" + (f"=={version}" if version else "")
        do = f"{sys.executable} -m pip install {package} numpy"
        raise Fault(f"onnxruntime-genai cannot be loaded ({error}). Install it with: {do}") from error
    return onnxruntime_genai


@dataclass(frozen=True)
class Opened:
    """A bundle of which the model is not needed: what `Text` reads of a `Runner`."""

    og: Any
    folder: Path


class Text:
    """Text to token ids and back, as the model was trained to see it."""

    def __init__(self, runner: Runner | Opened) -> None:
        self.tokenizer = runner.og.Tokenizer(str(runner.folder))
        settings = runner.folder / "tokenizer_config.json"
        bos = read_json(settings).get("bos_token") if settings.is_file() else None
        self.bos = bos.get("content") if isinstance(bos, dict) else bos

    def raw(self, text: str) -> list[int]:
        """Token ids of a text to be continued: the token that begins a text, where there is one, and the text."""
        ids = [int(i) for i in self.tokenizer.encode(text)]
        start = [] if self.bos is None else [int(self.tokenizer.to_token_id(self.bos))]
        return ids if ids[:1] == start else start + ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, as it comes token by token."""
        stream = self.tokenizer.create_stream()  # part of a character adds no text yet
        return "".join(stream.decode(token) for token in ids)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation up to the place where the model answers; ``tools`` as the template takes them.

        Raises Fault when the bundle has no chat template, or one that the runtime cannot render.
        """
        try:
            more = {} if tools is None else {"tools": json.dumps(list(tools))}
            text = self.tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True, **more)
        except RuntimeError as error:
            got = f"the bundle has no chat template that the runtime can render ({str(error)[:200]})"
            raise Fault(f"{got}. Use --raw, which gives the text as it is") from error
        return [int(i) for i in self.tokenizer.encode(text)]


def unserved(text: str, info: dict[str, Any]) -> str:
    """Why nothing can serve the call that ``text`` is, by the bundle's table ``functions``; "" where nothing is wrong.

    Texts that are no call, and bundles without a table, are not judged.
    """
    table = info.get("functions")
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    name, given = (call.get("name"), call.get("args")) if isinstance(call, dict) else (None, None)
    if not isinstance(table, dict) or not table or not isinstance(name, str):
        return ""
    if name not in table:
        return f"no such function: {plain(name)}; known: {', '.join(sorted(table))}"
    arguments = table[name] if isinstance(table[name], list) else []
    strange = sorted(set(given) - set(arguments)) if isinstance(given, dict) else []
    known = ", ".join(sorted(arguments)) or "none"
    return f"no such argument of {name}: {', '.join(map(plain, strange))}; known: {known}" if strange else ""


def plain(word: str) -> str:
    """A word that a model wrote, without what a terminal would act on, and not without end."""
    return (word if word.isprintable() else json.dumps(word))[:80]


def warn_unserved(text: str, info: dict[str, Any]) -> int:
    """Tell on standard error when nothing can serve the call that ``text`` is; returns the exit code."""
    reason = unserved(text, info)
    if reason:
        print(f"run.py: {reason}", file=sys.stderr, flush=True)
    return NO_SUCH_FUNCTION if reason else 0


def answer(runner: Runner, text: Text, ids: Sequence[int], max_new_tokens: int) -> str:
    """Say the continuation of ``ids`` piece by piece, and return it; Fault when they leave no room in the context."""
    runner.check_room(ids)
    dialogue = Dialogue(runner)
    dialogue.read(ids, max_new_tokens)
    stream = text.tokenizer.create_stream()  # part of a character adds no text yet
    said: list[str] = []
    for token in dialogue.tokens(max_new_tokens):
        said.append(stream.decode(token))
        say(said[-1])
    return "".join(said)


class Conversation:
    """A chat that keeps its turns, and the KV cache of what both turns have in common."""

    def __init__(self, runner: Runner, text: Text, head: list[dict[str, str]], max_new_tokens: int) -> None:
        self.runner, self.text, self.head, self.max_new_tokens = runner, text, head, max_new_tokens
        self.turns: list[dict[str, str]] = []
        self.dialogue = Dialogue(runner)

    def ask(self, asked: str) -> int:
        """Say the answer to ``asked``; return how many old messages were forgotten to make room.

        A turn that fails or is interrupted is not kept. Raises Fault when the message alone is too long.
        """
        turns = [*self.turns, {"role": "user", "content": asked}]
        room, forgotten = max(1, min(self.max_new_tokens, self.runner.context // 4)), 0
        while len(ids := self.text.chat([*self.head, *turns])) > self.runner.context - room:
            if len(turns) < 3:
                raise Fault(f"the message has {len(ids)} tokens; at most {self.runner.context - room} fit")
            turns, forgotten = turns[2:], forgotten + 2  # the oldest question with its answer
        said: list[str] = []
        stream = self.text.tokenizer.create_stream()
        self.dialogue.read(ids, self.max_new_tokens)
        for token in self.dialogue.tokens(self.max_new_tokens):
            said.append(stream.decode(token))
            say(said[-1])
        self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]
        return forgotten

    def restart(self) -> None:
        """Forget the KV cache, which may stand in the middle of an answer."""
        self.dialogue = Dialogue(self.runner)


def chat(conversation: Conversation, info: dict[str, Any] | None = None) -> None:
    """The loop of ``--chat``. Ctrl-C stops an answer, or the chat between answers, as Ctrl-D does; /new starts anew."""
    person = sys.stdin.isatty()
    say("Ctrl-C stops an answer, Ctrl-D ends, /new forgets the conversation.\n" * person)
    while True:
        try:
            asked = input("> " * person).strip()
        except (EOFError, KeyboardInterrupt):
            say("\n")
            return
        if asked == "/new":
            conversation.turns = []
        if not asked or asked == "/new":
            continue
        try:
            forgotten = conversation.ask(asked)
            say("\n" + (f"(the context is full: the oldest {forgotten} messages were forgotten)\n" * bool(forgotten)))
            warn_unserved(conversation.turns[-1]["content"], info or {})
        except KeyboardInterrupt:
            conversation.restart()
            say("\n(stopped)\n")
        except (Fault, RuntimeError) as fault:
            conversation.restart()
            say(f"({fault})\n")


class Service:
    """Answers requests, each a dict with ``op``, by a dict of JSON values; the model is opened on need.

    ``encode``: ``text`` is cut as it is (as one user's message where ``raw`` is false), ``messages`` with ``tools``,
    where there are any, go through the chat template: ``{"ids": [...]}``.
    ``answer``: the same continued by at most ``max_new_tokens`` up to an end: ``{"prompt": [ids], "ids": [...],
    "text": ...}``; a list of ``requests`` gives ``{"answers": [...]}``, in their order, and runs several at once.
    """

    def __init__(self, folder: Path, info: dict[str, Any], settings: Settings) -> None:
        check_config(folder / GENAI_CONFIG)
        self.folder, self.info, self.settings = folder, info, settings
        self.text = Text(Opened(runtime(info), folder))
        self.runner: Runner | None = None
        self.ops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"encode": self.encode, "answer": self.answer}

    def encode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        if "messages" in request:
            return {"ids": self.text.chat(request["messages"], request.get("tools"))}
        if request.get("raw", True):
            return {"ids": self.text.raw(request["text"])}
        return {"ids": self.text.chat([{"role": "user", "content": request["text"]}])}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The greedy answer to a text or a conversation, or to each of several."""
        several, most = request.get("requests"), request.get("max_new_tokens", MOST_NEW_TOKENS)
        if type(most) is not int or most < 1:
            raise Fault(f"max_new_tokens {most!r}; expected 1 or more")
        self.runner = self.runner or Runner(self.folder, self.info, self.settings)
        prompts = [self.encode(one)["ids"] for one in ([request] if several is None else several)]
        found = self.runner.answers(prompts, most)
        answers = [
            {"prompt": prompt, "ids": ids, "text": self.text.decode(ids)}
            for prompt, ids in zip(prompts, found, strict=True)
        ]
        return answers[0] if several is None else {"answers": answers}

    def reply(self, line: str) -> dict[str, Any]:
        """What is answered to a line; ``{"error": ...}`` where the request cannot be served."""
        try:
            request = json.loads(line)
            return self.ops[request["op"]](request)
        except (Fault, RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
            return {"error": str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {str(error)[:300]}"}


def serve(service: Service) -> None:
    """The loop of ``--serve``: one line out for each line in, until standard input ends."""
    for line in sys.stdin:
        if line.strip():
            say(json.dumps(service.reply(line)) + "\n")


def say(text: str) -> None:
    """Write ``text`` at once."""
    print(text, end="", flush=True)


@dataclass(frozen=True)
class Lengths:
    """What is measured: tokens of the prompt and of the answer, repeats, and repeats before that do not count."""

    prompt_tokens: int = 32
    new_tokens: int = 64
    repeats: int = 5
    warmup: int = 1


def spread(values: Sequence[float]) -> dict[str, float]:
    """Lowest, median and highest of the repeats."""
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}


def generate_once(runner: Runner, ids: Sequence[int], new_tokens: int, meter: EnergyMeter) -> dict[str, float | None]:
    """Seconds and joules of reading the prompt, of that and the first token, and of the tokens after the first."""
    generator = runner.start(len(ids) + new_tokens)
    meter.joules()
    start = time.perf_counter()
    runner.prefill(generator, ids)
    read = time.perf_counter()
    prefill_joules = meter.joules()
    begun = time.perf_counter()
    generator.generate_next_token()
    first = time.perf_counter()
    meter.joules()
    rest = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    done = time.perf_counter()
    return {
        "prefill_s": read - start,
        "first_token_s": read - start + first - begun,
        "decode_s": done - rest,
        "prefill_j": prefill_joules,
        "decode_j": meter.joules(),
    }


def _energy(meter: EnergyMeter, seen: Sequence[dict[str, Any]], lengths: Lengths) -> dict[str, Any]:
    """Joules per token of prefill and decode; None, with the reason, where the device does not tell."""
    found: dict[str, Any] = {"source": meter.source, "reason": meter.reason or None}
    for phase, tokens in (("prefill", lengths.prompt_tokens), ("decode", lengths.new_tokens - 1)):
        seconds, least = min(one[f"{phase}_s"] for one in seen), SHORTEST_S.get(meter.source or "", math.inf)
        told = seconds >= least
        found[f"{phase}_j_per_token"] = sum(one[f"{phase}_j"] for one in seen) / len(seen) / tokens if told else None
        if meter.source and not told:
            short = f"{phase} took {seconds:.3g} s in a repeat, and {meter.source} tells nothing below {least:g} s"
            found["reason"] = f"{found['reason']}; {short}" if found["reason"] else short
    return found


def bench(folder: Path, info: dict[str, Any], settings: Settings, lengths: Lengths, *,
          bandwidth: bool = True, sys_root: Path = Path("/sys")) -> dict[str, Any]:  # fmt: skip
    """Measure the bundle in this process, which should be a fresh one: a record of JSON values.

    Seconds, bytes, tokens per second, joules per token; rates are those of the median repeat.
    """
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(settings.threads)))  # before numpy loads
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of the time before, not of this work
    if lengths.new_tokens < 2 or lengths.warmup < 0:
        raise Fault("--bench needs --new-tokens of 2 or more and --warmup of 0 or more")
    if lengths.prompt_tokens + lengths.new_tokens > (context := int(info["onnx"]["context_tokens"])):
        raise Fault(f"{lengths.prompt_tokens} prompt and {lengths.new_tokens} new tokens; at most {context} together")
    og = runtime(info)
    import numpy  # noqa: F401 - loaded now, so that it counts as base memory

    base, start = peak_memory_bytes(), time.perf_counter()
    runner = Runner(folder, info, settings, endless=True)
    load_s = time.perf_counter() - start
    first_id = min(5, runner.vocabulary - 1)
    ids = [first_id + at % max(1, runner.vocabulary - first_id) for at in range(lengths.prompt_tokens)]
    meter, before = EnergyMeter(sys_root), temperatures(sys_root)
    seen = [generate_once(runner, ids, lengths.new_tokens, meter) for _ in range(lengths.warmup + lengths.repeats)]
    seen = seen[lengths.warmup :]
    after, peak = temperatures(sys_root), peak_memory_bytes()
    read = read_bandwidth() if bandwidth else None
    bits = info["model"].get("bits")
    return {
        "runtime": f"onnxruntime-genai {'fp32' if bits is None else f'int{bits}'}",
        "runtime_version": getattr(og, "__version__", None),
        "threads": settings.threads,
        "tuned": bool(info.get("tuned")),
        **vars(lengths),
        **_rates(seen, lengths, int(info["onnx"]["read_per_token_bytes"]), read),
        "load_s": load_s,
        "peak_memory_bytes": peak,
        "base_memory_bytes": base,
        "load_average": load_average,
        "energy": _energy(meter, seen, lengths),
        "temperature": {"before_c": before or None, "after_c": after or None, "reason": None if after else COLD},
        "machine": machine(),
    }


def _rates(seen: Sequence[dict[str, Any]], lengths: Lengths, weights: int, read: float | None) -> dict[str, Any]:
    """What the repeats come to: medians, spreads, and decode against the bound of reading ``weights`` bytes a token."""
    prefill, first = (spread([one[name] for one in seen]) for name in ("prefill_s", "first_token_s"))
    decode = spread([one["decode_s"] / (lengths.new_tokens - 1) for one in seen])
    bound = None if read is None else read / weights
    return {
        "prefill_tokens_per_s": lengths.prompt_tokens / prefill["median"],
        "decode_tokens_per_s": 1 / decode["median"],
        "first_token_s": first["median"],
        "prefill_s": prefill,
        "decode_s_per_token": decode,
        "first_token_spread_s": first,
        "weight_bytes": weights,
        "memory_bandwidth_bytes_per_s": read,
        "read_bound_tokens_per_s": bound,
        "read_bound_share": None if bound is None else 1 / decode["median"] / bound,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="run.py", description="Runs the bundle that this file lies in.")
    add = found.add_argument
    add("text", nargs="?", help="what to answer; - reads it from standard input")
    add("--chat", action="store_true", help="a conversation")
    add("--bench", action="store_true", help="measure speed and memory; prints one line of JSON")
    add("--check", action="store_true", help="check the SHA-256 of every file against bundle.json")
    add("--serve", action="store_true", help="answer requests: lines of JSON in, lines of JSON out")
    add("--raw", action="store_true", help="give the text as it is, without the chat template")
    add("--system", help="a system message, for templates that have one")
    add("--max-new-tokens", type=_positive, default=MOST_NEW_TOKENS, help="longest answer (256)")
    add("--threads", type=_positive, help="CPU threads; else what was tuned, else the physical cores")
    add("--prompt-tokens", type=_positive, default=32, help="of --bench (32)")
    add("--new-tokens", type=_positive, default=64, help="of --bench (64)")
    add("--repeats", type=_positive, default=5, help="of --bench (5)")
    add("--warmup", type=int, default=1, help="repeats of --bench that do not count (1)")
    add("--no-bandwidth", action="store_true", help="--bench does not measure reading memory (256 MiB)")
    add("--bundle", type=Path, default=Path(__file__).resolve().parent, help="the bundle; else this file's folder")
    add("--stop-on-eof", action="store_true", help="end when standard input is closed: whoever asked is gone")
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def _watch_input() -> None:
    """End this process when standard input is closed; a benchmark must not go on after its caller was stopped."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def reason_of(error: Exception, bundle: Path) -> str:
    """What the user is told of ``error``."""
    if isinstance(error, Fault):
        return str(error)
    if isinstance(error, RuntimeError):  # what the runtime raises for everything
        return f"onnxruntime-genai: {str(error)[:300]}"
    return f"{bundle}: its JSON is incomplete ({type(error).__name__}: {str(error)[:200]}). Copy the bundle again"


def _converse(args: argparse.Namespace, info: dict[str, Any], settings: Settings) -> int:
    """Serve, chat, or answer one text; returns the exit code."""
    if args.serve:
        serve(Service(args.bundle, info, settings))
        return 0
    runner = Runner(args.bundle, info, settings)
    text, head = Text(runner), [{"role": "system", "content": args.system}] if args.system is not None else []
    if args.chat:
        chat(Conversation(runner, text, head, args.max_new_tokens), info)
        return 0
    asked = sys.stdin.read() if args.text == "-" else args.text
    ids = text.raw(asked) if args.raw else text.chat([*head, {"role": "user", "content": asked}])
    said = answer(runner, text, ids, args.max_new_tokens)
    say("\n")
    return warn_unserved(said, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(arguments)
    if sum([args.chat, args.bench, args.check, args.serve, args.text is not None]) != 1:
        parser().error('give one of: a text, --chat, --bench, --check, --serve (such as: python run.py "hello")')
    if args.stop_on_eof:
        _watch_input()
    try:
        info = read_json(args.bundle / BUNDLE_FILE)
        if args.check:
            problems = damaged(args.bundle, info)
            say("".join(f"{line}\n" for line in [*problems, f"{len(problems)} damaged of {len(info['files'])} files"]))
            return 1 if problems else 0
        settings = Settings.of(info, read_json(args.bundle / GENAI_CONFIG), args.threads)
        if args.bench:
            lengths = Lengths(args.prompt_tokens, args.new_tokens, args.repeats, args.warmup)
            record = bench(args.bundle, info, settings, lengths, bandwidth=not args.no_bandwidth)
            say(json.dumps(record, sort_keys=True) + "\n")
            return 0
        return _converse(args, info, settings)
    except (Fault, RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
        print(f"run.py: error: {reason_of(error, args.bundle)}", file=sys.stderr)
        return error.code if isinstance(error, Fault) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # no module is taken from the folder of the bundle, which Python searches first, nor from the current one
    sys.path[:] = [
        p for p in sys.path if os.path.realpath(p) not in (os.path.dirname(os.path.realpath(__file__)), os.getcwd())
    ]
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:  # weights on huge pages: quicker to address
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # read when a process begins, so begin again
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very command
    sys.exit(main())
