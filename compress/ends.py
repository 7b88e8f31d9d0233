"""Which tokens the files of a model folder, or of a bundle, say end an answer.

`declared_ends` reads what the configs say, which is one part of `compress.encoding.stop_ids`: that adds the tokenizer
and its chat template. Loads no package; knows nothing of tokenizers.
"""

from __future__ import annotations

from pathlib import Path

from compress.errors import ModelError
from compress.json_reader import read_table

CONFIGS = ("config.json", "generation_config.json", "genai_config.json")


def declared_ends(folder: Path) -> tuple[int, ...]:
    """Ids under ``eos_token_id`` in the configs of ``folder``, sorted; null and ids that no token has are left out.

    Raises:
        ModelError: a config cannot be read, or says something else than ids.
    """
    ends, vocabulary = set[int](), list[int]()
    for path in (folder / name for name in CONFIGS):
        if not path.is_file():
            continue
        found = read_table(path, ModelError)
        settings = found.get("model") if path.name == "genai_config.json" else found
        settings = settings if isinstance(settings, dict) else {}
        said, size = settings.get("eos_token_id"), settings.get("vocab_size")
        listed = [token for token in (said if isinstance(said, list) else [said]) if token is not None]
        if any(type(token) is not int for token in listed):
            raise ModelError(str(path), f"eos_token_id {str(said)[:80]}", "a token id, a list of them, or null")
        ends.update(listed)
        vocabulary += [size] if type(size) is int else []
    return tuple(sorted(token for token in ends if 0 <= token < min(vocabulary, default=token + 1)))
