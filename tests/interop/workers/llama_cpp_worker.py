"""Run by the interpreter that has llama-cpp-python: logits and tokens of a GGUF file, into a .npz file.

usage: llama_cpp_worker.py REQUEST.json OUT.npz
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
# the KV cache in fp32, so that what differs is the arithmetic of the weights' types alone
model = Llama(
    request["model"], n_ctx=request["context"], n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
)
found = {}
for number, ids in enumerate(request["prompts"]):
    model.reset()
    model.eval(ids)
    found[f"logits{number}"] = np.array(model.scores[: len(ids)], dtype=np.float32)
for number, text in enumerate(request["texts"]):
    ids = model.tokenize(text.encode(), add_bos=True, special=True)
    found[f"tokens{number}"] = np.array(ids, dtype=np.int64)
    found[f"text{number}"] = np.frombuffer(model.detokenize(ids, special=True), dtype=np.uint8)
found["ends"] = np.array([model.token_bos(), model.token_eos()])
found["template"] = np.array(model.metadata.get("tokenizer.chat_template", ""))
np.savez(sys.argv[2], **found)
