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
import codecs
import hashlib
import heapq
import json
import math
import operator
import os
import platform
import re
import statistics
import sys
import threading
import time
import unicodedata
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
MOST_JSON = 128 << 20  # bytes of a JSON file
COLD = "the device offers no temperature in hwmon or thermal zones"
AFFINITIES = "session.intra_op_thread_affinities"  # the runtime refuses any other count of places than of threads
# A counter of energy moves every millisecond, a battery's gauge every second or so: of less time they tell nothing.
SHORTEST_S = {"rapl": 0.05, "battery": 5.0}

# Unicode's white space, and the characters that belong to words without being letters, marks or digits
SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
CIRCLED = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))
JOINERS = frozenset("\u200c\u200d" + "".join(chr(code) for codes in CIRCLED for code in codes))


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
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
        chunk = tuned.get("prefill_chunk")
        if not all(value is None or (type(value) is int and 0 < value < 1 << 31) for value in (found, chunk)):
            raise Fault(f"threads {found!r}, prefill_chunk {chunk!r}; expected whole numbers. Export the bundle again")
        entries = {str(name): str(value) for name, value in (tuned.get("config_entries") or {}).items()}
        if found != tuned.get("threads"):
            entries.pop(AFFINITIES, None)
        return cls(found, chunk, entries)


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
        ends, self.og, self.settings, self.folder, self.info = model.get("eos_token_id"), og, settings, folder, info
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
    info: dict[str, Any]


class Text:
    """Text to token ids and back, as the model was trained to see it, by what ``text`` of bundle.json says."""

    def __init__(self, runner: Runner | Opened) -> None:
        self.og, self.folder = runner.og, runner.folder
        plan = runner.info.get("text") or {}
        self.plan: dict[str, Any] = plan
        settings = runner.folder / "tokenizer_config.json"
        bos = read_json(settings).get("bos_token") if settings.is_file() else None
        self.bos = bos.get("content") if isinstance(bos, dict) else bos
        self.tokens = Tokens(plan, runner.folder, self._runtime_ids) if "cut" in plan else None
        trees, variables = plan.get("templates", {}), plan.get("variables", {})
        self.template = Template(trees["default"], variables) if "default" in trees else None
        self.with_tools = Template(trees["tool_use"], variables) if "tool_use" in trees else None

    @cached_property
    def tokenizer(self) -> Any:
        """The runtime's own."""
        return self.og.Tokenizer(str(self.folder))

    def _runtime_ids(self, text: str) -> list[int]:
        if "\0" in text:
            raise Fault("the text holds a NUL, at which the runtime would end it. Leave it out")
        return [int(i) for i in self.tokenizer.encode(text)]

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` alone."""
        return self.tokens.ids(text) if self.tokens else self._runtime_ids(text)

    def raw(self, text: str) -> list[int]:
        """Token ids of a text to be continued: the token that begins a text, where there is one, and the text."""
        ids = [*self.plan.get("before", []), *self.ids(text), *self.plan.get("after", [])]
        if "bos" in self.plan:
            start = [] if self.plan["bos"] is None else [int(self.plan["bos"])]
        else:  # an older bundle
            start = [] if self.bos is None else [int(self.tokenizer.to_token_id(self.bos))]
        return ids if ids[:1] == start else start + ids

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of a conversation up to the place where the model answers; ``tools`` as the template takes them.

        Raises Fault when the bundle has no chat template, or one that cannot be rendered.
        """
        return self.ids(self.rendered(messages, tools))

    def rendered(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The text of a conversation, as `chat`."""
        if not messages:
            raise Fault("the conversation is empty; the chat template needs a message")
        known = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self.template:
            told = None if tools is None else list(tools)
            template = self.template if told is None else self.with_tools or self.template
            given = {"messages": [_with_reasoning(message) for message in known], "tools": told, "documents": None}
            return template.render({**given, "add_generation_prompt": True})
        try:
            more = {} if tools is None else {"tools": json.dumps(list(tools))}
            found = self.tokenizer.apply_chat_template(json.dumps(known), add_generation_prompt=True, **more)
        except RuntimeError as error:
            got = f"the bundle has no chat template that the runtime can render ({str(error)[:200]})"
            raise Fault(f"{got}. Use --raw, which gives the text as it is") from error
        return str(found)

    def stream(self) -> Any:
        """What gives the text of tokens one by one by ``decode(token)``; part of a character adds no text yet."""
        if "decode" in self.plan:
            return Stream(self.plan["decode"], self.folder)
        return self.tokenizer.create_stream()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thoughts stand under every name that templates know."""
    found = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class Stream:
    """Text of token ids as they come, where the runtime's own is another than the tokenizer's."""

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        data = read_json(folder / "tokenizer.json")
        self.words = {index: word for word, index in data["model"]["vocab"].items()}
        self.added = {token["id"]: "" if token.get("special") else token["content"] for token in data["added_tokens"]}
        self.bytes = {char: byte for byte, char in enumerate(byte_alphabet())} if plan["byte_level"] else None
        self.mark, self.strip = plan.get("mark", ""), bool(plan.get("strip"))
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, token: int) -> str:
        """The text that ``token`` adds; special tokens add none."""
        word = self.added[token] if token in self.added else self.words.get(token, "")
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", word)
        if self.bytes is not None:  # an added token is spelled in bytes too, where its characters can be
            known = [self.bytes[char] for char in word if char in self.bytes]
            piece = bytes(known) if len(known) == len(word) else word.encode()
        else:
            piece = bytes([int(byte[1], 16)]) if byte else word.replace(self.mark or " ", " ").encode()
        if self.strip and piece:
            piece, self.strip = piece.removeprefix(b" "), False
        return self.decoder.decode(piece)


class Tokens:
    """Text to token ids as ``text`` of bundle.json says: what the runtime's tokenizer does not do is done here.

    Added tokens are found first, the rest is normalised and cut, by the runtime where ``cut`` is "runtime", else
    here, by byte-pair merges of tokenizer.json: as the library ``tokenizers`` does it.
    """

    def __init__(self, plan: dict[str, Any], folder: Path, encode: Callable[[str], Sequence[int]]) -> None:
        self.plan, self.folder, self.runtime = plan, folder, encode
        self.classes = {name: str(ranges) for name, ranges in plan.get("classes", {}).items()}
        added = plan.get("added", [])
        self.plain = Finder([token for token in added if "normalized" not in token])
        self.normal = Finder([{**token, "content": token["normalized"]} for token in added if "normalized" in token])
        self.any = Finder([{"content": token["content"], "id": token["id"]} for token in added])
        self.merges: Merges | None = None

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without what is put around a text."""
        found: list[int] = []
        for start, piece, token in self.plain.split(text):
            if token is not None:
                found.append(token)
                continue
            first = start == 0 and not self.shortened(piece)
            for at, part, inner in self.normal.split(self.normalised(piece, self.plan.get("normalizer", []))):
                found += [inner] if inner is not None else self.cut(part, first=first and at == 0)
        return found

    def shortened(self, piece: str) -> bool:
        """Whether normalising takes the beginning of ``piece`` away."""
        strips = [step for step in self.plan.get("normalizer", []) if step["type"] == "Strip" and step["left"]]
        return bool(strips) and piece[:1] in SPACES

    def cut(self, part: str, *, first: bool) -> list[int]:
        """Token ids of a normalised text without added tokens; ``first``: it begins the whole text."""
        if not part:
            return []
        plain = "\0" not in part and all(token is None for _, _, token in self.any.split(part))
        if self.plan["cut"] == "runtime" and plain:
            return list(self.runtime(part))
        if "pre" not in self.plan:
            raise Fault(f"the text holds {part[:40]!r}, which this bundle's tokenizer cannot cut. Leave it out")
        if self.merges is None:
            self.merges = Merges(self.folder / "tokenizer.json", byte_level=self.plan["byte_level"])
        words = [part]
        for step in self.plan["pre"]:
            words = [word for piece in words for word in self.step(step, piece, first=first and piece is words[0])]
        return [token for word in words if word for token in self.merges.ids(word)]

    def pattern(self, text: str) -> re.Pattern[str]:
        """A pattern whose named classes are filled in."""
        return re.compile(re.sub(r"⟦(.*?)⟧", lambda name: self.classes[name[1]], text))

    def normalised(self, text: str, steps: Sequence[dict[str, Any]]) -> str:
        """``text`` after the normalizer's steps."""
        for step in steps:
            kind = step["type"]
            if kind in ("NFC", "NFD", "NFKC", "NFKD"):
                text = unicodedata.normalize(kind, text)
            elif kind == "Lowercase":
                text = "".join(char.lower() for char in text)  # one by one: a sigma at the end stays as the others
            elif kind == "StripAccents":
                text = "".join(char for char in text if unicodedata.category(char)[0] != "M")
            elif kind == "Strip":
                text = text.lstrip("".join(SPACES)) if step["left"] else text
                text = text.rstrip("".join(SPACES)) if step["right"] else text
            elif kind == "Prepend":
                text = step["text"] + text if text else text
            elif kind == "Replace":
                new, pattern = step["text"], step["pattern"]
                text = self.pattern(pattern).sub(lambda _, new=new: new, text)  # type: ignore[misc]
        return text

    def step(self, step: dict[str, Any], piece: str, *, first: bool) -> list[str]:
        """``piece`` after one step of the pre-tokenizer."""
        if step["type"] == "Space":  # a blank before
            return [piece if piece.startswith(" ") else " " + piece]
        if step["type"] == "Mark":  # SentencePiece's mark for blanks
            mark = step["text"]
            piece = piece.replace(" ", mark)
            before = step["scheme"] == "always" or (step["scheme"] == "first" and first)
            return [mark + piece if before and not piece.startswith(mark) else piece]
        return split(self.pattern(step["pattern"]), piece, step["behavior"], inverted=step["invert"])


def split(pattern: re.Pattern[str], piece: str, behavior: str, *, inverted: bool) -> list[str]:
    """``piece`` split at the matches of ``pattern``; ``behavior`` says where a match goes, empty parts are left out."""
    parts: list[tuple[str, bool]] = []
    at = 0
    for match in pattern.finditer(piece):
        if match.end() > match.start():
            parts += [(piece[at : match.start()], inverted), (match[0], not inverted)]
            at = match.end()
    parts = [(part, hit) for part, hit in [*parts, (piece[at:], inverted)] if part]
    if behavior == "Removed":
        return [part for part, hit in parts if not hit]
    found: list[str] = []
    joins, before = False, False
    for part, hit in parts:
        if behavior == "Contiguous":
            joins = bool(found) and hit == before
        elif behavior == "MergedWithPrevious":
            joins = bool(found) and hit and not before
        elif behavior == "MergedWithNext":
            joins = bool(found) and before and not hit
        found[len(found) - joins :] = [found[-1] + part if joins else part]
        before = hit
    return found


class Finder:
    """Finds added tokens in a text: the leftmost, of these the longest."""

    def __init__(self, tokens: Sequence[dict[str, Any]]) -> None:
        self.tokens = {token["content"]: token for token in tokens if token["content"]}
        names = sorted(self.tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def split(self, text: str) -> list[tuple[int, str, int | None]]:
        """(place, text, token id or None) of the parts of ``text``."""
        found: list[tuple[int, str, int | None]] = []
        at = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token, (start, stop) = self.tokens[match[0]], match.span()
            if token.get("single_word") and (_in_word(text[start - 1 : start]) or _in_word(text[stop : stop + 1])):
                continue
            while token.get("lstrip") and start > at and text[start - 1] in SPACES:
                start -= 1
            while token.get("rstrip") and stop < len(text) and text[stop] in SPACES:
                stop += 1
            if at < start:
                found.append((at, text[at:start], None))
            found.append((start, text[start:stop], int(token["id"])))
            at = stop
        return [*found, (at, text[at:], None)] if at < len(text) else found


def _in_word(char: str) -> bool:
    """Whether ``char`` is one of Unicode's word characters; no character is none."""
    kind = unicodedata.category(char) if char else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or char in JOINERS


class Merges:
    """Byte-pair encoding of words by the merges of a tokenizer.json."""

    def __init__(self, path: Path, *, byte_level: bool) -> None:
        model = read_json(path)["model"]
        self.vocabulary: dict[str, int] = model["vocab"]
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        number = self.vocabulary.__getitem__
        self.ranks = {(number(a), number(b)): (rank, number(a + b)) for rank, (a, b) in enumerate(pairs)}
        self.whole, self.fallback = bool(model.get("ignore_merges")), bool(model.get("byte_fallback"))
        self.unknown: int | None = self.vocabulary.get(model.get("unk_token") or "")
        self.fuse, self.known = bool(model.get("fuse_unk")), {}  # type: tuple[bool, dict[str, list[int]]]
        self.alphabet = byte_alphabet() if byte_level else None

    def ids(self, word: str) -> list[int]:
        """Token ids of ``word``, of which no merge crosses the ends."""
        if self.alphabet:
            word = "".join(self.alphabet[byte] for byte in word.encode("utf-8", "surrogatepass"))
        if word not in self.known:
            if len(self.known) > 10_000:  # texts without end must not fill the memory
                self.known.clear()
            whole = self.vocabulary.get(word) if self.whole else None
            self.known[word] = [whole] if whole is not None else self.merged(self.symbols(word))
        return self.known[word]

    def symbols(self, word: str) -> list[int]:
        """The characters of ``word`` as tokens; one that is none becomes bytes or the unknown token."""
        found: list[int] = []
        unknown = 0
        for char in word:
            spelled = [self.vocabulary.get(f"<0x{byte:02X}>") for byte in char.encode("utf-8")] if self.fallback else []
            if (token := self.vocabulary.get(char)) is not None:
                found += [self.unknown or 0] * unknown + [token]
                unknown = 0
            elif spelled and None not in spelled:
                found += [byte for byte in spelled if byte is not None]
            elif self.unknown is not None:
                unknown = 1 if self.fuse else unknown + 1
        return found + [self.unknown or 0] * unknown

    def merged(self, symbols: list[int]) -> list[int]:
        """``symbols`` after all merges: the lowest rank first, of equal ones the leftmost."""
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        gone = [False] * len(symbols)
        heap: list[tuple[int, int, int]] = []

        def offer(at: int) -> None:
            if at >= 0 and after[at] >= 0 and (pair := self.ranks.get((symbols[at], symbols[after[at]]))):
                heapq.heappush(heap, (pair[0], at, pair[1]))

        for at in range(len(symbols)):
            offer(at)
        while heap:
            rank, at, token = heapq.heappop(heap)
            right = after[at]
            if gone[at] or right < 0 or self.ranks.get((symbols[at], symbols[right])) != (rank, token):
                continue
            symbols[at], gone[right], after[at] = token, True, after[right]
            if after[at] >= 0:
                before[after[at]] = at
            offer(at)
            offer(before[at])
        return [token for at, token in enumerate(symbols) if not gone[at]]


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


Scope = ChainMap[str, Any]


class Undefined:
    """A name or key of a template that is not there: empty when shown, and an error when anything is done with it."""

    def __init__(self, name: object = "") -> None:
        self.name = name

    def __str__(self) -> str:
        return ""

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undefined)

    def __hash__(self) -> int:
        return 0


class Namespace(dict[str, Any]):
    """Jinja's ``namespace()``, the one value that a loop's body can change for those outside."""


class Loop:
    """``loop`` within a for."""

    def __init__(self, values: list[Any]) -> None:
        self.values, self.length, self.index0 = values, len(values), 0

    def facts(self, name: str) -> Any:
        """One of the attributes of ``loop``."""
        at, most = self.index0, self.length
        if name in ("previtem", "nextitem"):
            there = at - 1 if name == "previtem" else at + 1
            return self.values[there] if 0 <= there < most else Undefined(name)
        found = {"index": at + 1, "index0": at, "first": at == 0, "last": at == most - 1, "length": most, "depth": 1}
        found |= {"revindex": most - at, "revindex0": most - at - 1, "depth0": 0}
        return (lambda *given: given[at % len(given)]) if name == "cycle" else found.get(name, Undefined(name))


class LoopEnd(Exception):
    """A ``break`` (``goes_on`` false) or ``continue`` of a template."""

    def __init__(self, *, goes_on: bool) -> None:
        super().__init__()
        self.goes_on = goes_on


def _join(values: Any, between: str = "", attribute: str | int | None = None) -> str:
    found = values if attribute is None else [at_path(value, attribute) for value in values]
    return str(between).join(shown(value) for value in found)


def _title(text: Any) -> str:
    return "".join(part[0].upper() + part[1:].lower() for part in re.split(r"([-\s({\[<]+)", shown(text)) if part)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * width
    head, *rest = (text + "\n").splitlines() or [""]
    rest = [pad + line if line or blank else line for line in rest]
    return "\n".join([(pad if first else "") + head, *rest])


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _number_of(value: Any, default: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        try:
            return kind(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


def _order(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _sorted(values: Any, reverse: bool = False, case_sensitive: bool = False,
            attribute: str | None = None) -> list[Any]:  # fmt: skip
    def key(value: Any) -> Any:
        found = value if attribute is None else at_path(value, attribute)
        return found if case_sensitive else _order(found)

    return sorted(values, key=key, reverse=reverse)


def _unique(values: Any) -> list[Any]:
    seen: list[Any] = []
    return [value for value in values if _order(value) not in seen and not seen.append(_order(value))]  # type: ignore[func-returns-value]


def _default(value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, Undefined) or (boolean and not value) else value


def shown(value: Any) -> str:
    """A value as a template writes it."""
    return value if isinstance(value, str) else str(value)


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "capitalize": lambda text: shown(text).capitalize(),
    "count": len,
    "d": _default,
    "default": _default,
    "dictsort": lambda value, case_sensitive=False: sorted(
        value.items(), key=lambda pair: pair[0] if case_sensitive else _order(pair[0])
    ),
    "first": lambda values: next(iter(values), Undefined("first")),
    "float": lambda value, default=0.0: _number_of(value, default, float),
    "indent": _indent,
    "int": lambda value, default=0: _number_of(value, default, int),
    "items": lambda value: list(value.items()) if isinstance(value, dict) else [],
    "join": _join,
    "last": lambda values: next(iter(list(values)[::-1]), Undefined("last")),
    "length": len,
    "list": list,
    "lower": lambda text: shown(text).lower(),
    "max": max,
    "min": min,
    "replace": lambda text, old, new, count=-1: shown(text).replace(shown(old), shown(new), count),
    "reverse": lambda value: value[::-1] if isinstance(value, str) else list(value)[::-1],
    "safe": shown,  # the export lets it through only where it is the last filter of what is written
    "sort": _sorted,
    "string": shown,
    "sum": sum,
    "title": _title,
    "tojson": _to_json,
    "trim": lambda text, chars=None: shown(text).strip(chars),
    "unique": _unique,
    "upper": lambda text: shown(text).upper(),
}
COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda value, where: value in where,
    "notin": lambda value, where: value not in where,
}
TESTS: dict[str, Callable[..., Any]] = {
    "boolean": lambda value: isinstance(value, bool),
    "callable": callable,
    "defined": lambda value: not isinstance(value, Undefined),
    "divisibleby": lambda value, by: value % by == 0,
    "even": lambda value: value % 2 == 0,
    "false": lambda value: value is False,
    "float": lambda value: isinstance(value, float),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "iterable": lambda value: isinstance(value, str | list | tuple | dict | range | Undefined),
    "lower": lambda value: shown(value).islower(),
    "mapping": lambda value: isinstance(value, dict) and not isinstance(value, Namespace),
    "none": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float),
    "odd": lambda value: value % 2 == 1,
    "sameas": operator.is_,
    "sequence": lambda value: isinstance(value, str | list | tuple | dict | range | Undefined),
    "string": lambda value: isinstance(value, str),
    "true": lambda value: value is True,
    "undefined": lambda value: isinstance(value, Undefined),
    "upper": lambda value: shown(value).isupper(),
    **dict.fromkeys(("eq", "equalto", "=="), COMPARED["eq"]),
    **dict.fromkeys(("ne", "!="), COMPARED["ne"]),
    **dict.fromkeys(("lt", "lessthan", "<"), COMPARED["lt"]),
    **dict.fromkeys(("le", "<="), COMPARED["lteq"]),
    **dict.fromkeys(("gt", "greaterthan", ">"), COMPARED["gt"]),
    **dict.fromkeys(("ge", ">="), COMPARED["gteq"]),
    "in": COMPARED["in"],
}
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
}
# what a template may call of a value; none of it changes anything
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
        "isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}


def _raise(message: Any) -> Any:
    raise Fault(f"the chat template refuses the messages: {shown(message)[:300]}")


GLOBALS: dict[str, Any] = {
    "raise_exception": _raise,
    "strftime_now": time.strftime,
    "namespace": Namespace,
    "dict": dict,
    "range": range,
}


class Template:
    """A chat template as the export wrote it down: a tree of lists, each a kind and its parts, that is walked here."""

    def __init__(self, tree: Sequence[Any], variables: dict[str, Any]) -> None:
        self.tree, self.variables = tree, variables

    def render(self, given: dict[str, Any]) -> str:
        """The text; Fault where the template refuses what it is given."""
        try:
            return self.text(self.tree[1], ChainMap({}, {**GLOBALS, **self.variables, **given}))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise Fault(f"the chat template cannot render the messages: {str(error)[:300]}") from error

    # Statements write into the list of texts ``out``; the parts of each are those of Jinja's node of that name.

    def block(self, nodes: Sequence[Any], scope: Scope, out: list[str]) -> None:
        """Statements one after the other; what they set stays in ``scope``."""
        for kind, *parts in nodes:
            getattr(self, f"do_{kind}")(scope, out, *parts)

    def text(self, nodes: Sequence[Any], scope: Scope) -> str:
        """What statements write."""
        out: list[str] = []
        self.block(nodes, scope, out)
        return "".join(out)

    def do_Output(self, scope: Scope, out: list[str], nodes: list[Any]) -> None:
        out += [shown(value) for value in self.values(nodes, scope)]

    def do_If(self, scope: Scope, out: list[str], test: Any, body: Any, others: list[Any], last: list[Any]) -> None:
        for condition, chosen in [(test, body), *((other[1], other[2]) for other in others)]:
            if self.value(condition, scope):
                self.block(chosen, scope, out)
                return
        self.block(last, scope, out)

    def do_For(self, scope: Scope, out: list[str], target: Any, values: Any, body: list[Any], last: list[Any],
               test: Any, _recursive: bool) -> None:  # fmt: skip
        def inner(value: Any) -> Scope:
            found = scope.new_child()
            self.set(target, value, found)
            return found

        found = [value for value in self.value(values, scope) if test is None or self.value(test, inner(value))]
        loop = Loop(found)
        for loop.index0, value in enumerate(found):
            within = inner(value)
            within["loop"] = loop
            try:
                self.block(body, within, out)
            except LoopEnd as end:
                if not end.goes_on:
                    break
        if not found:
            self.block(last, scope.new_child(), out)

    def do_Break(self, _scope: Scope, _out: list[str]) -> None:
        raise LoopEnd(goes_on=False)

    def do_Continue(self, _scope: Scope, _out: list[str]) -> None:
        raise LoopEnd(goes_on=True)

    def do_Assign(self, scope: Scope, _out: list[str], target: Any, node: Any) -> None:
        self.set(target, self.value(node, scope), scope)

    def do_AssignBlock(self, scope: Scope, _out: list[str], target: Any, filtered: Any, body: list[Any]) -> None:
        text = self.text(body, scope.new_child())
        self.set(target, text if filtered is None else self.of_Filter(scope, text, *filtered[2:]), scope)

    def do_FilterBlock(self, scope: Scope, out: list[str], body: list[Any], filtered: Any) -> None:
        out.append(shown(self.of_Filter(scope, self.text(body, scope.new_child()), *filtered[2:])))

    def do_Scope(self, scope: Scope, out: list[str], body: list[Any]) -> None:
        self.block(body, scope.new_child(), out)

    def do_With(self, scope: Scope, out: list[str], targets: list[Any], values: list[Any], body: list[Any]) -> None:
        found, within = self.values(values, scope), scope.new_child()
        for target, value in zip(targets, found, strict=True):
            self.set(target, value, within)
        self.block(body, within, out)

    def do_Macro(self, scope: Scope, _out: list[str], name: str, args: Any, defaults: Any, body: Any) -> None:
        scope[name] = self.macro(scope, args, defaults, body)

    def do_CallBlock(self, scope: Scope, out: list[str], call: Any, args: Any, defaults: Any, body: Any) -> None:
        function, given, named = self.called(scope, *call[1:4])
        out.append(shown(function(*given, **named, caller=self.macro(scope, args, defaults, body))))

    def macro(self, scope: Scope, args: list[Any], defaults: list[Any], body: list[Any]) -> Callable[..., str]:
        """A function that gives the text of ``body``."""
        names = [arg[1] for arg in args]

        def call(*given: Any, **named: Any) -> str:
            within = scope.new_child(dict.fromkeys(names, Undefined()))
            known = {**dict(zip(names, given, strict=False)), **named}
            if len(given) > len(names) or set(known) - {*names, "caller"}:
                raise Fault("the chat template gives a macro what it does not take")
            for name, default in zip(names[len(names) - len(defaults) :], defaults, strict=True):
                within[name] = known[name] if name in known else self.value(default, within)
            within.update(known)
            return self.text(body, within)

        return call

    def set(self, target: Any, value: Any, scope: Scope) -> None:
        """Give ``value`` to a name, to an entry of a namespace, or to several names."""
        if target[0] == "Tuple":
            for part, item in zip(target[1], value, strict=True):
                self.set(part, item, scope)
        elif target[0] == "NSRef":
            if not isinstance(holder := scope[target[1]], Namespace):
                raise Fault(f"the chat template sets {target[1]}.{target[2]}, and {target[1]} is no namespace")
            holder[target[2]] = value
        else:
            scope[target[1]] = value

    # Expressions.

    def value(self, node: Any, scope: Scope) -> Any:
        """The value of an expression; None for no expression. A text stands for itself."""
        if node is None or isinstance(node, str):
            return node
        if node[0] in ARITHMETIC:
            return ARITHMETIC[node[0]](self.value(node[1], scope), self.value(node[2], scope))
        return getattr(self, f"of_{node[0]}")(scope, *node[1:])

    def values(self, nodes: Sequence[Any], scope: Scope) -> list[Any]:
        """The values of expressions."""
        return [self.value(node, scope) for node in nodes]

    def of_TemplateData(self, _scope: Scope, data: str) -> str:
        return data

    def of_Const(self, _scope: Scope, value: Any) -> Any:
        return value

    def of_Name(self, scope: Scope, name: str) -> Any:
        return scope.get(name, Undefined(name))

    def of_List(self, scope: Scope, items: list[Any]) -> list[Any]:
        return self.values(items, scope)

    def of_Tuple(self, scope: Scope, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self.values(items, scope))

    def of_Dict(self, scope: Scope, pairs: list[Any]) -> dict[Any, Any]:
        return {self.value(key, scope): self.value(value, scope) for _, key, value in pairs}

    def of_CondExpr(self, scope: Scope, test: Any, first: Any, other: Any) -> Any:
        if self.value(test, scope):
            return self.value(first, scope)
        return Undefined() if other is None else self.value(other, scope)

    def of_Not(self, scope: Scope, node: Any) -> bool:
        return not self.value(node, scope)

    def of_Neg(self, scope: Scope, node: Any) -> Any:
        return -self.value(node, scope)

    def of_Pos(self, scope: Scope, node: Any) -> Any:
        return +self.value(node, scope)

    def of_And(self, scope: Scope, left: Any, right: Any) -> Any:
        return self.value(left, scope) and self.value(right, scope)

    def of_Or(self, scope: Scope, left: Any, right: Any) -> Any:
        return self.value(left, scope) or self.value(right, scope)

    def of_Concat(self, scope: Scope, nodes: list[Any]) -> str:
        return "".join(shown(value) for value in self.values(nodes, scope))

    def of_Compare(self, scope: Scope, first: Any, others: list[Any]) -> Any:
        left, found = self.value(first, scope), True
        for _, kind, node in others:
            right = self.value(node, scope)
            if not (found := COMPARED[kind](left, right)):
                break
            left = right
        return found

    def of_Slice(self, scope: Scope, *parts: Any) -> slice:
        return slice(*self.values(parts, scope))

    def of_Getitem(self, scope: Scope, node: Any, key: Any) -> Any:
        return item(self.value(node, scope), self.value(key, scope))

    def of_Getattr(self, scope: Scope, node: Any, name: str) -> Any:
        return attribute(self.value(node, scope), name)

    def called(self, scope: Scope, node: Any, args: list[Any], named: list[Any]) -> tuple[Any, list[Any], Any]:
        """What is called, with what."""
        return self.value(node, scope), self.values(args, scope), self.named(named, scope)

    def named(self, nodes: list[Any], scope: Scope) -> dict[str, Any]:
        """Arguments by name."""
        return {key: self.value(value, scope) for _, key, value in nodes}

    def of_Call(self, scope: Scope, node: Any, args: list[Any], named: list[Any]) -> Any:
        function, given, by_name = self.called(scope, node, args, named)
        return function(*given, **by_name)

    def of_Test(self, scope: Scope, node: Any, name: str, args: list[Any], named: list[Any]) -> bool:
        return bool(TESTS[name](self.value(node, scope), *self.values(args, scope), **self.named(named, scope)))

    def of_Filter(self, scope: Scope, node: Any, name: str, args: list[Any], named: list[Any]) -> Any:
        value, given, by_name = self.value(node, scope), self.values(args, scope), self.named(named, scope)
        if name == "map" and "attribute" in by_name:
            default = by_name.get("default", Undefined())
            found = [at_path(one, by_name["attribute"]) for one in value]
            return [default if isinstance(one, Undefined) else one for one in found]
        if name == "map":
            return [FILTERS[given[0]](one, *given[1:], **by_name) for one in value]
        if name in ("select", "reject", "selectattr", "rejectattr"):
            path = [given.pop(0)] if name.endswith("attr") else []
            test = TESTS[given[0]] if given else bool
            wanted = name.startswith("select")
            return [one for one in value if bool(test(at_path(one, *path), *given[1:])) is wanted]
        return FILTERS[name](value, *given, **by_name)


def at_path(value: Any, path: str | int = "") -> Any:
    """What ``value`` holds at a path such as ``function.name``; itself for an empty one."""
    for name in str(path).split(".") if path != "" else ():
        value = item(value, int(name) if name.isdigit() else name)
    return value


def item(value: Any, key: Any) -> Any:
    """``value[key]`` in a template, which may also be an attribute."""
    if isinstance(value, Undefined):
        raise Fault(f"the chat template asks for {key!r} of {value.name!r}, which is not there")
    try:
        if not isinstance(value, Loop | Undefined):
            return value[key]
    except (AttributeError, TypeError, LookupError):
        pass
    return attribute(value, key) if isinstance(key, str) and not isinstance(value, dict) else Undefined(key)


def attribute(value: Any, name: str) -> Any:
    """``value.name`` in a template: a method, else an entry; `Undefined` where there is none."""
    if isinstance(value, Undefined):
        raise Fault(f"the chat template asks for {name!r} of {value.name!r}, which is not there")
    if isinstance(value, Loop):
        return value.facts(name)
    for kind, methods in METHODS.items():
        if isinstance(value, kind) and name in methods and not isinstance(value, Namespace):
            return getattr(value, name)
    return value.get(name, Undefined(name)) if isinstance(value, dict) else Undefined(name)


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
    stream = text.stream()
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
        stream = self.text.stream()
        self.dialogue.read(ids, self.max_new_tokens)
        for token in self.dialogue.tokens(self.max_new_tokens):
            said.append(stream.decode(token))
            say(said[-1])
        self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]
        return forgotten

    def restart(self) -> None:
        """Forget the KV cache, which may stand in the middle of an answer."""
        self.dialogue = Dialogue(self.runner)


def chat(conversation: Conversation) -> None:
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
            warn_unserved(conversation.turns[-1]["content"], conversation.runner.info)
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
        self.text = Text(Opened(runtime(info), folder, info))
        self.runner: Runner | None = None
        self.ops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "encode": self.encode,
            "decode": self.decode,
            "render": self.render,
            "answer": self.answer,
        }

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
            {"prompt": prompt, "ids": ids, "text": self.decode({"ids": ids})["text"]}
            for prompt, ids in zip(prompts, found, strict=True)
        ]
        return answers[0] if several is None else {"answers": answers}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """The text of ``ids``, as it is said token by token: ``{"text": ...}``."""
        stream = self.text.stream()
        return {"text": "".join(stream.decode(int(token)) for token in request["ids"])}

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        """The text of ``messages`` with ``tools``, before it is cut: ``{"text": ...}``."""
        return {"text": self.text.rendered(request["messages"], request.get("tools"))}

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
    """Write ``text`` at once; a terminal obeys no control character that a model made."""
    if sys.stdout.isatty():
        text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
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
        chat(Conversation(runner, text, head, args.max_new_tokens))
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
    except (Fault, RuntimeError, OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
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
