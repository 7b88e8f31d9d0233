"""Run by the interpreter that has llama-cpp-python: logits and tokens of GGUF files, into a .npz file.

usage: llama_cpp_worker.py REQUEST.json OUT.npz
"""

import json
import sys
import traceback

import numpy as np
from llama_cpp import Llama

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
found = {}


def look(key, wanted):
    """Put what the file gives into ``found``."""
    # the KV cache in fp32, so that what differs is the arithmetic of the weights' types alone
    model = Llama(
        wanted["model"], n_ctx=wanted["context"], n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    for number, ids in enumerate(wanted["prompts"]):
        model.reset()
        model.eval(ids)
        found[f"{key}/logits{number}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
    for number, text in enumerate(wanted["texts"]):
        ids = model.tokenize(text.encode(), add_bos=True, special=True)
        found[f"{key}/tokens{number}"] = np.array(ids, dtype=np.int64)
    found[f"{key}/ends"] = np.array([model.token_bos(), model.token_eos()])
    found[f"{key}/template"] = np.array(model.metadata.get("tokenizer.chat_template", ""))


for name, asked in request["models"].items():
    try:
        look(name, asked)
    except Exception as error:
        traceback.print_exc()
        found[f"{name}/error"] = np.array(f"{type(error).__name__}: {error}")
np.savez(sys.argv[2], **found)
