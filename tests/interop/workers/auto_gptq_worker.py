"""Run by the interpreter that has auto-gptq: weights and logits of GPTQ folders, into a .npz file.

usage: auto_gptq_worker.py REQUEST.json OUT.npz
"""

import json
import sys
import traceback

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors import safe_open

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
found = {}


def look(key, folder):
    """Put what the folder holds into ``found``."""
    loaded = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True,
        disable_exllamav2=True, torch_dtype=torch.float32, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    found[f"{key}/rope_theta"] = np.array(float(loaded.model.config.rope_theta))
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found[f"{key}/{name}.{part}"] = getattr(module, part).cpu().numpy()
    if loaded.model.config.tie_word_embeddings:  # AutoGPTQ 0.7.1 leaves a tied embedding uninitialised
        with safe_open(f"{folder}/model.safetensors", framework="pt") as file, torch.no_grad():
            loaded.model.get_input_embeddings().weight.copy_(file.get_tensor("model.embed_tokens.weight"))
        loaded.model.tie_weights()
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
