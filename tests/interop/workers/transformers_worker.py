"""Run by an interpreter with transformers and a GPTQ back-end: logits of folders, into a .npz file.

usage: transformers_worker.py REQUEST.json OUT.npz
"""

import json
import sys
import traceback

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
found = {}


def look(key, folder):
    """Put what the folder holds into ``found``."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    kinds = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
    found[f"{key}/kinds"] = np.array(kinds)
    for number, text in enumerate(request["texts"]):
        found[f"{key}/tokens{number}"] = np.array(tokenizer(text)["input_ids"])
    with torch.no_grad():
        for number, ids in enumerate(request["prompts"]):
            found[f"{key}/logits{number}"] = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


for name, place in request["models"].items():
    try:
        look(name, place)
    except Exception as error:
        traceback.print_exc()
        found[f"{name}/error"] = np.array(f"{type(error).__name__}: {error}")
np.savez(sys.argv[2], **found)
