"""Run by the interpreter that has auto-gptq: weights and logits of GPTQ folders, into a .npz file.

usage: auto_gptq_worker.py REQUEST.json OUT.npz
"""

import json
import sys

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM

with open(sys.argv[1], encoding="utf-8") as stream:
    request = json.load(stream)
found = {}
for key, folder in request["models"].items():
    loaded = AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", use_safetensors=True, use_triton=False, disable_exllama=True,
        disable_exllamav2=True, torch_dtype=torch.float32, inject_fused_attention=False, inject_fused_mlp=False,
    )  # fmt: skip
    found |= {f"{key}/rope_theta": np.array(float(loaded.model.config.rope_theta))}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found[f"{key}/{name}.{part}"] = getattr(module, part).cpu().numpy()
    if request.get("tie"):
        loaded.model.tie_weights()
    with torch.no_grad():
        for number, ids in enumerate(request["prompts"]):
            found[f"{key}/logits{number}"] = loaded.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
np.savez(sys.argv[2], **found)
