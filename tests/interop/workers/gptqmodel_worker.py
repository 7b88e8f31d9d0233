"""Run by the interpreter that has gptqmodel: codes and logits of GPTQ folders, into a .npz file.

usage: gptqmodel_worker.py REQUEST.json OUT.npz
"""

import json
import sys
import traceback

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
found = {}


def look(key, folder):
    """Put what the folder holds into ``found``."""
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found[f"{key}/{name}.{part}"] = getattr(module, part).cpu().numpy()
            found[f"{key}/{name}.bits"] = np.array(module.bits)
    with torch.no_grad():
        for number, ids in enumerate(request["prompts"]):
            found[f"{key}/logits{number}"] = loaded.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


for name, place in request["models"].items():
    try:
        look(name, place)
    except Exception as error:
        traceback.print_exc()
        found[f"{name}/error"] = np.array(f"{type(error).__name__}: {error}")
np.savez(sys.argv[2], **found)
