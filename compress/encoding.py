"""Rows become token ids, in one place, so that training, scoring and evaluation see the same tokens.

`encode_rows` gives `TokenRow` with the prediction targets marked, `encode_prompt` what a model is asked with,
`bare_user_prefix` the template up to the user's slot, `stop_ids` the one definition of what ends an answer, `decode`
the text of an answer, `load_tokenizer` opens a folder. `token_rows` is the one door by which the model package gets
rows. Knows nothing of models and tensors; transformers is imported on use.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.chat_templates import TemplateFault, render
from compress.ends import declared_ends
from compress.errors import DataError, ModelError
from compress.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from compress.data.rows import Row

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
SLOT = "USERSLOT7f3a"  # stands where a message goes; plain letters, so that no template trims or escapes it


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as tokens.

    ``answer`` has one entry per token: 1 where the token is a prediction target, that is the answer and its
    end-of-turn token of a chat, and every token but the first of a text.
    """

    id: str
    ids: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first target."""
        return self.ids[: self.answer.index(1)] if 1 in self.answer else self.ids

    def learning(self, which: Literal["answer", "all"]) -> TokenRow:
        """The row as training takes it: ``all`` makes every token but the first a target, user turns included."""
        if which == "answer" or not self.ids:
            return self
        return replace(self, answer=(0,) + (1,) * (len(self.ids) - 1))

    @property
    def targets(self) -> int:
        """How many tokens are targets."""
        return sum(self.answer)


@dataclass(frozen=True, slots=True)
class AskedRow:
    """One row as a request: the messages ``before`` the user's last, its ``text``, and what the row says to it.

    ``answer`` is empty where the row has none. A text is a user's message.
    """

    id: str
    before: tuple[Message, ...]
    text: str
    label: str | None
    answer: str


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Open the tokenizer of a model folder exactly as its ``tokenizer.json`` says; never from the network.

    What the folder's configs say of the end of an answer goes with it, for `stop_ids`.

    Raises:
        ModelError: there is no ``tokenizer.json``, or it or a config cannot be read.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            str(folder),
            "no tokenizer.json in it",
            "a model folder with a fast tokenizer",
            "Save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    declared = declared_ends(folder)
    read_tokenizer(folder)
    with _library(str(folder / "tokenizer.json")):
        # not AutoTokenizer: for some model types it swaps in its own splitting rules over those of the file
        found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found.declared_ends = declared  # an attribute, so that copies of the tokenizer keep it
    return found


@contextmanager
def _library(where: str) -> Iterator[None]:
    """Whatever the tokenizers library makes of a damaged file or a text as ModelError.

    It raises bare Exception, and where it panics a BaseException of its own.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(where, f"the tokenizer cannot be used ({_first_line(error)})") from error


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, truncate: bool = False
) -> list[TokenRow]:
    """Encode ``rows``, one `TokenRow` each and in their order.

    Chats go through the chat template and end with the first of `stop_ids` behind the answer: what the template puts
    after it (some add a line feed) is left off, and where it puts none, EOS is added. Texts get the BOS token, when the
    tokenizer has one, and no EOS. With ``truncate`` a longer row loses its end, possibly all of its targets
    (``targets`` is then 0).

    Raises:
        DataError: a row is longer than ``max_tokens``, has no answer or no text, or does not fit the template.
        ModelError: a chat, but the tokenizer has no chat template.
    """
    chats = [row for row in rows if row.messages]
    by_id = dict(zip(map(id, chats), _encode_chats(chats, tokenizer), strict=True))
    texts = [row for row in rows if not row.messages]
    by_id.update(zip(map(id, texts), _encode_texts(texts, tokenizer), strict=True))
    return [_fit(by_id[id(row)], max_tokens, truncate=truncate) for row in rows]


def token_rows(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int, truncate: bool = False
) -> list[TokenRow]:
    """Read a data artifact and encode its rows; rows that truncation left without a target are left out, and logged.

    Raises:
        DataError: no artifact, or no row with a target, or as `encode_rows`.
    """
    from compress.data.rows import read_rows  # pyarrow loads on use

    encoded = encode_rows(read_rows(folder), tokenizer, max_tokens=max_tokens, truncate=truncate)
    kept = [row for row in encoded if row.targets]
    if len(kept) < len(encoded):
        logger.warning(
            "%d of %d rows have no answer within %d tokens", len(encoded) - len(kept), len(encoded), max_tokens
        )
    if not kept:
        raise DataError(str(folder), f"no row with an answer within {max_tokens} tokens", do="Raise max_tokens")
    return kept


def row_values(folder: Path, column: str) -> dict[str, Any]:
    """What the rows of a data artifact hold in ``column`` (``source``, ``label`` or ``meta.KEY...``), by row id.

    Raises:
        DataError: no artifact, or a row without the column.
    """
    from compress.data.rows import read_rows  # pyarrow loads on use

    first, *keys = column.split(".")
    found: dict[str, Any] = {}
    for row in read_rows(folder):
        value = {"source": row.source, "label": row.label, "meta": row.meta}[first]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value in (None, ""):
            raise DataError(f"row {row.id}", f"has no {column}", "every row with one")
        found[row.id] = value
    return found


def ids_of_source(folder: Path, source: str) -> frozenset[str]:
    """Ids of the rows of a data artifact that came from ``source``.

    Raises:
        DataError: no artifact, or no such row.
    """
    from compress.data.rows import read_rows  # pyarrow loads on use

    rows = read_rows(folder)
    found = frozenset(row.id for row in rows if row.source == source)
    if not found:
        named = ", ".join(sorted({row.source for row in rows})[:8])
        raise DataError(str(folder), f"no row of source {source!r}", f"one of its sources: {named}")
    return found


def asked_rows(folder: Path) -> list[AskedRow]:
    """Read a data artifact as requests, in its order.

    Raises:
        DataError: no artifact, or a row whose prompt does not end in a user's message.
    """
    from compress.data.rows import read_rows  # pyarrow loads on use

    found = []
    for row in read_rows(folder):
        turns = row.prompt if row.is_chat else ({"role": "user", "content": row.text},)
        if not turns or turns[-1]["role"] != "user":
            raise DataError(
                f"row {row.id}", "no user's message to answer", "a text, or a chat whose prompt ends in one"
            )
        found.append(AskedRow(row.id, turns[:-1], turns[-1]["content"], row.label, row.answer))
    return found


def sampled_texts(folder: Path, count: int, seed: int) -> tuple[list[str], list[list[dict[str, str]]]]:
    """Texts and conversations of a seeded sample of ``count`` rows of a data artifact, as they are: no tokens.

    A chat gives its prompt, and itself whole as the beginning of a longer one.
    """
    from compress.data.rows import read_rows  # pyarrow loads on use

    rows = read_rows(folder)
    picked = random.Random(seed).sample(rows, min(count, len(rows)))  # noqa: S311 - a sample
    chats = [list(map(dict, turns)) for row in picked if row.is_chat for turns in (row.prompt, row.messages) if turns]
    return [row.text for row in picked if not row.is_chat], chats


def encode_answers(
    id: str, prompt: Sequence[Message], answers: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[TokenRow]:
    """Encode each of ``answers`` behind the same ``prompt``; ``id`` names the row in errors.

    Raises:
        DataError: the prompt or an answer does not fit the template.
        ModelError: the tokenizer has no chat template.
    """
    from compress.data.rows import Row  # pyarrow loads on use

    before = tuple(dict(message) for message in prompt)
    rows = [Row(id, messages=(*before, {"role": "assistant", "content": answer})) for answer in answers]
    return _encode_chats(rows, tokenizer)


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of ``messages`` with the generation prompt behind them.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses these messages.
    """
    return _tokenize([_render(messages, tokenizer, "prompt", generation=True)], tokenizer)[0]


def encode_text_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of a text to be continued: BOS, when the tokenizer has one, and the text."""
    with _library("tokenizer"):
        ids = tokenizer([text])["input_ids"][0]
    return _with_bos(ids, tokenizer)


def bare_user_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of the chat template up to the place where a user's first message begins (Magpie).

    Raises:
        ModelError: no chat template, or the template does not show the user's message.
    """
    whole = _render([{"role": "user", "content": SLOT}], tokenizer, "template", generation=True)
    before, found, _ = whole.partition(SLOT)
    if not found or not before:
        raise ModelError("chat template", "has no text before the user's message", "a template that marks the roles")
    return _tokenize([before], tokenizer)[0]


def end_of_turn(tokenizer: PreTrainedTokenizerFast, role: str = "user") -> int | None:
    """The token of its own that the template puts behind a message of ``role``; ``None`` when it puts none.

    Behind a user's message it stands at once; behind an assistant's it is the first one, since what a template puts
    before it (a line feed, say) belongs to every answer. Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template refuses such a message.
    """
    marks, behind = _marks(tokenizer), _behind(tokenizer, role)
    return next((token for token in (behind[:1] if role == "user" else behind) if token in marks), None)


def _behind(tokenizer: PreTrainedTokenizerFast, role: str) -> list[int]:
    """Tokens of what the template puts behind a message of ``role``."""
    messages = [{"role": "user", "content": SLOT if role == "user" else "x"}]
    if role == "assistant":
        messages.append({"role": "assistant", "content": SLOT})
    try:
        text = _render(messages, tokenizer, "template", generation=role == "user")
    except DataError:  # some templates take no conversation without a system message
        system = {"role": "system", "content": "x"}
        text = _render([system, *messages], tokenizer, "template", generation=role == "user")
    return _tokenize([text.partition(SLOT)[2]], tokenizer)[0]


def _marks(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of tokens that are no text: the special ones, and those added to the vocabulary that are not blanks."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip())
    return special_ids(tokenizer).union(added)


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Tokens that end an answer, sorted: this is what all of training, evaluation and export mean by its end.

    EOS of the tokenizer; of ``config.json``, ``generation_config.json`` or a bundle's ``genai_config.json``, where
    `load_tokenizer` opened it; and the template's end of an assistant's turn.
    """
    found = {tokenizer.eos_token_id, *getattr(tokenizer, "declared_ends", ())}
    if tokenizer.chat_template:
        found.add(end_of_turn(tokenizer, "assistant"))
    return tuple(sorted(token for token in found if token is not None))


def decode(ids: Iterable[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Text of generated ids, without special tokens and without any tidying of spaces."""
    with _library("tokenizer"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _encode_chats(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    """Prefix and rest of every chat are tokenized apart only when the whole does not begin with the prefix."""
    if not rows:
        return []
    prefixes, wholes = [], []
    for row in rows:
        if row.messages[-1]["role"] != "assistant":
            raise DataError(f"row {row.id}", "the last message is not the assistant's", "a chat that ends in an answer")
        prefix = _render(row.messages[:-1], tokenizer, f"row {row.id}", generation=True)
        whole = _render(row.messages, tokenizer, f"row {row.id}", generation=False)
        if not whole.startswith(prefix):
            raise _not_a_prefix(row.id, prefix, whole)
        prefixes.append(prefix)
        wholes.append(whole)
    prefix_ids, whole_ids = _tokenize(prefixes, tokenizer), _tokenize(wholes, tokenizer)
    ends, behind = stop_ids(tokenizer), _behind(tokenizer, "assistant")
    encoded = []
    for row, prefix, whole, before, ids in zip(rows, prefixes, wholes, prefix_ids, whole_ids, strict=True):
        rest = ids[len(before) :]
        if ids[: len(before)] != before:
            rest = _rest_apart(row.id, before, whole[len(prefix) :], ids, tokenizer)
        rest = _ended(rest, behind, ends, tokenizer)
        encoded.append(TokenRow(row.id, (*before, *rest), (0,) * len(before) + (1,) * len(rest)))
    return encoded


def _not_a_prefix(row_id: str, prefix: str, whole: str) -> ModelError:
    at = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), min(len(prefix), len(whole)))
    return ModelError(
        f"chat template, row {row_id}",
        f"the whole chat does not begin with its prompt: after {prefix[max(0, at - 20) : at]!r} the prompt goes on "
        f"with {prefix[at : at + 20]!r} and the chat with {whole[at : at + 20]!r}",
        "a template whose generation prompt is how an assistant turn begins",
        "Correct the template, so that what is trained is what is asked",
    )


def _rest_apart(
    row_id: str, before: list[int], rest: str, whole: list[int], tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """Tokens of the answer alone, for when a token of the whole text straddles the end of the prompt.

    Generation starts right behind the prompt's own tokens, so this is also how the model will write the answer.
    """
    ids = _tokenize([rest], tokenizer)[0]
    if tokenizer.decode([*before, *ids]) != tokenizer.decode(whole):
        raise ModelError(
            f"tokenizer, row {row_id}",
            "the answer cannot be tokenized apart from its prompt, and together a token straddles the two",
            "a template whose generation prompt ends in a special token",
        )
    return ids


def _ended(ids: list[int], behind: list[int], ends: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """An answer up to its end; what stands ``behind`` an answer in the template is known, but may have been merged."""
    start = len(ids) - len(behind)
    if not behind or ids[start:] != behind:  # blanks and special tokens at the end are the template's
        start, marks = len(ids), special_ids(tokenizer).union(ends)
        while start and (ids[start - 1] in marks or not tokenizer.decode([ids[start - 1]]).strip()):
            start -= 1
    for at in range(max(start, 0), len(ids)):
        if ids[at] in ends:
            return ids[: at + 1]
    end = ends[0] if ends and tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def _encode_texts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    if not rows:
        return []
    with _library("tokenizer"):
        found = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    encoded = []
    for row, plain in zip(rows, found, strict=True):
        ids = _with_bos(plain, tokenizer)
        if len(ids) < 2:
            raise DataError(f"row {row.id}", "the text gives no token to predict", "a text of at least one token")
        encoded.append(TokenRow(row.id, tuple(ids), (0,) + (1,) * (len(ids) - 1)))
    return encoded


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    bos = tokenizer.bos_token_id
    return ids if bos is None or (ids and ids[0] == bos) else [bos, *ids]


def _fit(row: TokenRow, max_tokens: int, *, truncate: bool) -> TokenRow:
    if len(row.ids) <= max_tokens:
        return row
    if not truncate:
        raise DataError(
            f"row {row.id}",
            f"has {len(row.ids)} tokens",
            f"at most {max_tokens} (max_tokens)",
            "Raise max_tokens, set truncate, or drop long rows by data.selection heuristics",
        )
    return TokenRow(row.id, row.ids[:max_tokens], row.answer[:max_tokens])


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, where: str, *, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            "tokenizer",
            "has no chat template, but the rows are chats",
            "chat_template.jinja or chat_template in tokenizer_config.json",
            "Give the model folder a template, or use text rows",
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        named = ", ".join(sorted(tokenizer.chat_template))
        raise ModelError("tokenizer", f"has chat templates without a default one: {named}", "one named default")
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # several by name, and none for this
        raise ModelError("tokenizer", f"has no chat template that is meant here ({_first_line(error)})") from error
    try:
        return render(template, messages, generation=generation, tokens=tokenizer.special_tokens_map)
    except TemplateFault as error:
        raise DataError(where, f"the chat template refuses the messages ({error})") from error


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The template writes its own special tokens, so none are added."""
    with _library("tokenizer"):
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of all special tokens, named by the tokenizer's settings or only marked in its file."""
    marked = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *marked))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
