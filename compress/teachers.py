"""Teachers: who scores, continues, embeds and answers for the stages.

`Teacher` is the protocol. `LocalTeacher` is a model folder run in torch, `EndpointTeacher` an OpenAI-compatible
server, `RecordedTeacher` a file of replies; `open_teacher` tells them apart. ``can`` says what a teacher is able to;
the rest raises `UserError`. Importing this module loads neither torch nor transformers: a local teacher's model is
opened when it is first asked. Knows nothing of stages and profiles.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from compress import hub, hub_cache
from compress.answers import Generation, TokenScores
from compress.encoding import TokenRow, decode, encode_prompt, load_tokenizer, stop_ids
from compress.endpoint import ChatClient, Reply, Request
from compress.errors import DataError, ModelError, UserError
from compress.files import file_sha256, json_text, write_whole
from compress.identities import digest_of, model_identity
from compress.json_reader import parse_json
from compress.names import is_hub_name
from compress.progress import Bar, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Message = Mapping[str, str]
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")
EVERYTHING = frozenset({"score", "generate", "embed", "answer"})


class Teacher(Protocol):
    """What stages may ask of a teacher. All methods give one result per input, in order."""

    @property
    def identity(self) -> str:
        """SHA-256 over what decides its answers: a model's files, or the endpoint's address and model name."""
        ...

    @property
    def folder(self) -> Path | None:
        """The model folder, where there is one."""
        ...

    @property
    def can(self) -> frozenset[str]:
        """Which of ``score``, ``generate``, ``embed`` and ``answer`` work; the others raise `UserError`."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    def score(self, rows: Sequence[TokenRow], progress: Progress | None = None) -> list[TokenScores]:
        """Log probabilities of the target tokens."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Collection[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Continuations of token prompts; ``stop_ids`` as the property when left out."""
        ...

    def embed(self, rows: Sequence[TokenRow], progress: Progress | None = None) -> NDArray[np.float32]:
        """Mean last hidden state over each row's tokens, length 1: (rows, hidden)."""
        ...

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Answers to conversations that end in a user's turn."""
        ...


def open_teacher(where: Path | str, *, threads: int = 2) -> Teacher:
    """Open what a profile names as its teacher.

    ``where`` is a model folder, a ``.jsonl`` file of recorded replies, ``http(s)://HOST/v1#MODEL`` for an endpoint,
    or a hub name ``owner/name``, which is fetched into the hub's own cache.

    Raises:
        ModelError: nothing usable there. UserError: the endpoint's URL is incomplete.
    """
    text = str(where)
    if text.startswith(("http:/", "https:/")):
        url, _, model = text.partition("#")
        scheme, _, rest = url.partition(":")
        return EndpointTeacher(f"{scheme}://{rest.lstrip('/')}", model)  # a Path has merged the two slashes
    path = Path(where)
    if path.is_file() and path.suffix == ".jsonl":
        return RecordedTeacher(path)
    if path.exists():
        return LocalTeacher(path, threads=threads)
    if is_hub_name(text, Path()):
        return LocalTeacher(fetch_hub_model(text), threads=threads)
    raise ModelError(text, "no such folder", "a model folder, a hub name owner/name, or http://HOST/v1#MODEL")


def fetch_hub_model(name: str) -> Path:
    """Folder of a hub model in the local hub cache, fetched when it is not there: safetensors and text files only.

    Raises:
        ModelError: no such model, no access, or no network; or files are missing after all.
    """
    folder = hub.local_folder(name)
    if folder is not None and hub.is_whole(folder):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    do = "Fetch it where there is a network, and give the folder's path as teacher"
    try:
        model, _, revision = name.partition("@")
        folder = Path(snapshot_download(model, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        got = f"is no folder here and cannot be fetched from the hub ({first}); {hub_cache.held(name)}"
        if folder is not None:
            got += f"; its files {', '.join(hub_cache.missing_of_model(folder))} are missing there"
        raise ModelError(name, got, do=do) from error
    missing = hub_cache.missing_of_model(folder)
    if missing:  # without a network the client gives what is there
        raise ModelError(name, f"the snapshot {folder} lacks {', '.join(missing)}", "a whole snapshot", do)
    return folder


# ---------------------------------------------------------------------------------- a model folder


class LocalTeacher:
    """A model folder of a supported architecture, in fp32 on the first GPU that torch sees, else on the CPU.

    Args:
        batch_tokens: padded tokens per scoring batch.
        batch_size: rows generated together.
    """

    can = EVERYTHING

    def __init__(self, folder: Path, *, threads: int = 2, batch_tokens: int = 8192, batch_size: int = 64) -> None:
        self._folder, self.threads = folder, threads
        self.batch_tokens, self.batch_size = batch_tokens, batch_size

    @property
    def folder(self) -> Path:
        """The model folder."""
        return self._folder

    @cached_property
    def identity(self) -> str:
        """Digest of configuration, weights, tokenizer and template; reads every byte once."""
        return model_identity(self._folder, file_sha256)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Opened on first use."""
        return load_tokenizer(self._folder)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """EOS, the template's end of turn, and what ``generation_config.json`` adds. Sorted."""
        found = set(stop_ids(self.tokenizer))
        path = self._folder / "generation_config.json"
        if path.is_file():
            try:
                more = parse_json(path.read_bytes()).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise ModelError(str(path), "cannot be read as a JSON object") from error
            found.update(token for token in (more if isinstance(more, list) else [more]) if isinstance(token, int))
        return tuple(sorted(found))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The torch model, opened and checked on first use."""
        import torch

        from compress.model.checkpoint import check_tokenizer, load_model, read_config

        check_tokenizer(self._folder, read_config(self._folder))
        torch.set_num_threads(self.threads)
        model = load_model(self._folder)
        return model.to("cuda") if torch.cuda.is_available() else model

    def score(self, rows: Sequence[TokenRow], progress: Progress | None = None) -> list[TokenScores]:
        """One forward pass per batch, in bf16 where weights stored so run faster so; see `local_teacher.score_rows`."""
        import torch

        from compress.local_teacher import score_rows

        dtype = torch.bfloat16 if self._scores_in_bf16 else torch.float32
        with _bar(progress, "score", len(rows)) as bar:
            return score_rows(self.model, rows, bar=bar, batch_tokens=self.batch_tokens, dtype=dtype)

    @cached_property
    def _scores_in_bf16(self) -> bool:
        from compress.model.checkpoint import read_config
        from compress.model.distillation.settings import choose_bf16

        config = read_config(self._folder)  # of the file: the open model is in fp32
        stored, width = config.get("dtype") or config.get("torch_dtype"), int(config["hidden_size"])
        device = self.model.device.type
        return stored == "bfloat16" and choose_bf16("auto", width=width, training=False, device=device)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Collection[int] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Every row draws from its own generator: the batch size changes nothing; see `local_teacher.generate`."""
        from compress.local_teacher import Sampling, generate

        stops = frozenset(self.stop_ids if stop_ids is None else stop_ids)
        sampling = Sampling(max_new_tokens, stops, temperature, top_p, seed)
        with _bar(progress, "generate", len(prompts)) as bar:
            return generate(self.model, prompts, sampling, batch_size=batch_size or self.batch_size, bar=bar)

    def embed(self, rows: Sequence[TokenRow], progress: Progress | None = None) -> NDArray[np.float32]:
        """See `compress.local_teacher.embed_rows`."""
        from compress.local_teacher import embed_rows

        with _bar(progress, "embed", len(rows)) as bar:
            return embed_rows(self.model, rows, bar=bar, batch_tokens=self.batch_tokens)

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Template, generate, decode."""
        prompts = [encode_prompt(messages, self.tokenizer) for messages in conversations]
        found = self.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=progress,
        )
        return [Reply(decode(g.ids, self.tokenizer), g.mean_logprob, g.finished) for g in found]


def _bar(progress: Progress | None, what: str, total: int) -> AbstractContextManager[Bar | None]:
    return nullcontext() if progress is None else progress.bar(what, total)


# ---------------------------------------------------------------------------------- text only


class _TextTeacher:
    """What teachers share that give text and nothing else."""

    can = frozenset({"answer"})
    kind = ""

    @property
    def folder(self) -> None:
        """There is none."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """There is none."""
        self._cannot("show its tokenizer")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """There are none."""
        self._cannot("show its tokenizer")

    def score(self, *_: Any, **__: Any) -> list[TokenScores]:
        """Not possible."""
        self._cannot("score given answers")

    def embed(self, *_: Any, **__: Any) -> NDArray[np.float32]:
        """Not possible."""
        self._cannot("embed rows")

    def generate(self, *_: Any, **__: Any) -> list[Generation]:
        """Not possible."""
        self._cannot("continue tokens")

    def _cannot(self, what: str) -> NoReturn:
        raise UserError("teacher", f"{self.kind} cannot {what}", "a model folder", "Give a local model as teacher")


class EndpointTeacher(_TextTeacher):
    """An OpenAI-compatible server. It answers; it neither scores given text nor continues tokens. Distillation asks its
    ``client`` for the likeliest tokens of given rows, see ``endpoint_logprobs``.

    ``options`` go to `compress.endpoint.ChatClient`.
    """

    kind = "an endpoint"

    def __init__(self, url: str, model: str, **options: Any) -> None:
        self.client = ChatClient(url, model, **options)

    @property
    def identity(self) -> str:
        """Digest of address and model name; what the server changes behind them cannot be seen."""
        return digest_of({"endpoint": self.client.url, "model": self.client.model})

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Reply]:
        """Several requests in flight, results in order."""
        request = Request(max_new_tokens, temperature, top_p, seed)
        with _bar(progress, "answer", len(conversations)) as bar:
            return self.client.complete_all(conversations, request, bar=bar)


class RecordedTeacher(_TextTeacher):
    """Replies from a JSONL file, one object a line: ``messages``, ``reply``, and where known ``mean_logprob`` (nats per
    token) and ``finished``. Sampling settings are not looked at. Of several lines for one conversation the last counts.

    Raises:
        DataError: the file is absent, or a line is not such an object (the line is named).
    """

    kind = "a recording"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._replies: dict[str, Reply] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(str(path), f"cannot be read ({error})", "a JSONL file of replies") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                key, reply = _recorded(line, f"{path}:{number}")
                self._replies[key] = reply

    @cached_property
    def identity(self) -> str:
        """Digest of the file."""
        return digest_of({"recording": file_sha256(self.path)})

    def answer(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[Reply]:
        """The recorded replies; DataError names a conversation that was not recorded."""
        found = []
        for messages in conversations:
            reply = self._replies.get(_conversation_key(messages))
            if reply is None:
                last = messages[-1]["content"] if messages else ""
                raise DataError(str(self.path), f"no reply to {last[:80]!r}", "a line for every conversation")
            found.append(reply)
        return found


def record(path: Path, conversations: Sequence[Sequence[Message]], replies: Sequence[Reply]) -> None:
    """Write a file that `RecordedTeacher` reads: ask an endpoint once, replay it for nothing."""
    lines = []
    for messages, reply in zip(conversations, replies, strict=True):
        known = math.isfinite(reply.mean_logprob)
        line = {
            "messages": [dict(message) for message in messages],
            "reply": reply.text,
            "mean_logprob": reply.mean_logprob if known else None,
            "finished": reply.finished,
        }
        lines.append(json_text(line) + "\n")
    write_whole(path, "".join(lines))


def _conversation_key(messages: Sequence[Message]) -> str:
    return digest_of([[message["role"], message["content"]] for message in messages])


def _recorded(line: str, where: str) -> tuple[str, Reply]:
    form = 'an object such as {"messages": [{"role": "user", "content": "hi"}], "reply": "hello"}'
    try:
        found = parse_json(line)
        text, mean = found["reply"], found.get("mean_logprob")
        key = _conversation_key(found["messages"])
        reply = Reply(text, math.nan if mean is None else float(mean), bool(found.get("finished", True)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(where, f"{line[:80]!r}", form) from error
    if not isinstance(text, str):
        raise DataError(where, f"reply is a {type(text).__name__}", form)
    return key, reply
