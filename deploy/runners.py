"""Running a bundle: greedy generation and logits in onnxruntime-genai, the runtime that the device uses.

`GenaiRunner` answers the same two calls as a torch model does, so that one evaluation reads both. Everything that
matters is set outright: threads (the runtime's own choice costs 1.5 to 2 times), greedy search, no end tokens of the
runtime's own (the caller's count), weights on huge pages. What `edgestill tune` found is in the bundle and taken from
there. Imports no torch, so that a benchmark's memory is the runtime's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from compress.errors import DataError, ModelError
from compress.json_reader import read_table, required
from compress.scratch import scratch
from deploy import huge_pages
from deploy.bundle import check_safe, open_bundle, tuned
from deploy.bundle_runner.run import Fault, Settings

P = ParamSpec("P")
R = TypeVar("R")


def _as_model_error(method: Callable[P, R]) -> Callable[P, R]:
    """What the runtime raises while it works, for a configuration that does not fit the graph, as ModelError."""

    @wraps(method)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            folder = args[0].folder if args and isinstance(args[0], GenaiRunner) else "bundle"
            raise ModelError(str(folder), f"onnxruntime-genai cannot run it: {str(error)[:300]}") from error

    return told


class GenaiRunner:
    """A bundle, or a bare folder of model, runtime config and tokenizer, opened on ``threads`` threads.

    ``threads`` left out: as tuned, else as configured, else one a physical core.
    ``on_huge_pages`` left out: where the weights are large.
    ``session`` and ``search`` override entries of these parts of the runtime's config.

    Raises:
        ModelError: the bundle is damaged or the runtime cannot open it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        batch_size: int = 32,
        verify: bool = True,
        session: Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
        on_huge_pages: bool | None = None,
    ) -> None:
        if verify:
            open_bundle(folder).need("onnx")
        config_file = folder / "genai_config.json"
        if not config_file.is_file():
            raise ModelError(str(config_file), "no such file", "a bundle with the format onnx")
        check_safe(folder)
        configured, where = read_table(config_file, ModelError), str(config_file)
        settings = required(configured, "model", dict, where, ModelError)
        for key in ("context_length", "vocab_size"):
            required(settings, key, int, where, ModelError, least=1, most=1 << 31)
        for part in ("model.decoder.session_options", "search"):
            table = configured
            for name in part.split("."):
                table = required({name: {}, **table}, name, dict, where, ModelError)
        required({"pad_token_id": 0, **settings}, "pad_token_id", int | None, where, ModelError)  # type: ignore[arg-type]
        entries = {**configured.get("search", {}), **(search or {})}
        required({"chunk_size": 1, **entries}, "chunk_size", int | None, where, ModelError)  # type: ignore[arg-type]
        self.context, self.vocabulary = int(settings["context_length"]), int(settings["vocab_size"])
        self.pad_id = int(settings.get("pad_token_id") or 0)
        try:
            chosen = Settings.of({"tuned": tuned(folder)}, configured, threads)
        except Fault as error:
            raise ModelError(str(folder), str(error)) from error
        self.folder, self.batch_size, self.threads = folder, batch_size, chosen.threads
        self._chunk = int({**configured.get("search", {}), **(search or {})}.get("chunk_size") or self.context)
        entries = {**chosen.config_entries, **(session or {})}
        session = {**entries, "intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        decoder = {"eos_token_id": [], "decoder": {"session_options": session}}
        self._overlay = json.dumps({"model": decoder, "search": dict(search or {})})
        self.model = self._open(folder)
        if on_huge_pages is None:
            weights = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
            on_huge_pages = weights >= huge_pages.WORTH_BYTES
        if on_huge_pages:
            huge_pages.collapse()

    def _open(self, folder: Path) -> og.Model:
        try:
            config = og.Config(str(folder))
            config.overlay(self._overlay)
            return og.Model(config)
        except RuntimeError as error:  # what the runtime raises for everything
            raise ModelError(str(folder), f"onnxruntime-genai cannot open it: {str(error)[:300]}") from error

    @cached_property
    def _every_position(self) -> og.Model:
        """The bundle's graph with logits at all positions of a prompt; the bundle's own may give the last alone."""
        from deploy.variants import every_position_copy

        with scratch() as temporary:
            changed = every_position_copy(self.folder, temporary)
            return self._open(temporary) if changed else self.model

    @_as_model_error
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
    ) -> list[list[int]]:
        """Return the greedy continuation of each prompt, in order, without the stop token.

        A continuation ends before a token of ``stop_ids``, after ``max_new_tokens``, or when the context is full.
        Prompts of one length run together, so that nothing is padded. Raises DataError for an empty prompt, one that
        fills the context, or ids outside the vocabulary.
        """
        for index, prompt in enumerate(prompts):
            self._check(prompt, self.context - 1, f"prompt {index}")
        results: list[list[int]] = [[] for _ in prompts]
        for picked in self._batches(prompts):
            answers = self._generate([prompts[i] for i in picked], max_new_tokens, frozenset(stop_ids))
            for index, answer in zip(picked, answers, strict=True):
                results[index] = answer
        return results

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the indices of prompts that run together: equal lengths, none with the pad token."""
        by_length: dict[int, list[int]] = {}
        batches: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            if self.pad_id in prompt:
                batches.append([index])
            else:
                by_length.setdefault(len(prompt), []).append(index)
        for indices in by_length.values():
            batches += [indices[at : at + self.batch_size] for at in range(0, len(indices), self.batch_size)]
        return batches

    def _generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        length, rows = len(prompts[0]), len(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(rows))
        steps = min(max_new_tokens, self.context - length)
        if steps < 1:
            return answers
        generator = self.start(length + steps, rows)
        ids = np.asarray(prompts, dtype=np.int32)
        generator.append_tokens(ids if rows > 1 else ids[0])
        for _ in range(steps):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                if row in running:
                    if int(token) in stop_ids:
                        running.discard(row)
                    else:
                        answers[row].append(int(token))
            if not running:
                break
        return answers

    def start(self, max_length: int, rows: int = 1, *, model: og.Model | None = None) -> og.Generator:
        """Return a greedy generator for ``rows`` sequences of at most ``max_length`` tokens."""
        params = og.GeneratorParams(model or self.model)
        params.set_search_options(max_length=max_length, min_length=0, do_sample=False, num_beams=1, batch_size=rows)
        return og.Generator(model or self.model, params)

    def encode(self, texts: Sequence[str], most: int) -> list[list[int]]:
        """Return the token ids of each text by the bundle's tokenizer, cut to ``most`` and the context."""
        tokenizer = og.Tokenizer(self.model)
        cut = [[int(token) for token in tokenizer.encode(text)[: min(most, self.context)]] for text in texts]
        return [ids for ids in cut if ids]

    @_as_model_error
    def next_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the fp32 logits (vocabulary,) after ``ids``, read at once by the very graph that generates.

        Raises DataError as `logits`.
        """
        self._check(ids, self.context, "logits")
        generator = self.start(self.context)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        return np.array(generator.get_output("logits")[0, -1], dtype=np.float32)

    @_as_model_error
    def logits(self, ids: Sequence[int], *, prefill: int | None = None) -> npt.NDArray[np.float32]:
        """Return the fp32 logits (T, vocabulary) after each of the ``ids``, which the model is given, not asked for.

        ``prefill`` is how many of them are read at once; the others come one at a time through the KV cache. Left
        out: all at once. Reads a copy of the graph that keeps every position, over the same weights and with the same
        operators. Raises DataError when they exceed the context or the vocabulary.
        """
        self._check(ids, self.context, "logits")
        first = len(ids) if prefill is None else prefill
        generator = self.start(self.context, model=self._every_position)
        parts = []
        starts = [*range(0, first, self._chunk), *range(first, len(ids))]  # the runtime would give a last chunk alone
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            generator.append_tokens(np.asarray(ids[start:stop], dtype=np.int32))
            parts.append(np.array(generator.get_output("logits")[0], dtype=np.float32))
        return np.concatenate(parts)

    def _check(self, ids: Sequence[int], most: int, where: str) -> None:
        if not 0 < len(ids) <= most:
            raise DataError(where, f"{len(ids)} tokens", f"1 to {most}")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise DataError(where, f"token id {min(ids) if min(ids) < 0 else max(ids)}", f"0 to {self.vocabulary - 1}")
