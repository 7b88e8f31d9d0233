#!/bin/sh
# transformers opens a GGUF file without the rotary scaling that its metadata names.
#
# Versions:  transformers 5.23.0, gguf 0.19.0, torch 2.13.0
# Expected:  llama.rope.scaling.type, .factor and .original_context_length become rope_parameters, as the base does,
#            or the file is refused.
# Behaviour: linear and YaRN scaling are both read as rope_type default. The same file in llama.cpp is scaled; the two
#            disagree from the first positions on, without a message.
# Output:    none: default, linear: default, yarn: default
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.2.6
venv/bin/python -W ignore - <<'PY' 2>/dev/null
import os
import sys

import gguf
import numpy as np
from transformers import AutoConfig

os.mkdir("model")
found = {}
for scaling in ("none", "linear", "yarn"):
    out = gguf.GGUFWriter(f"model/{scaling}.gguf", "llama")
    out.add_context_length(4096)
    out.add_embedding_length(64)
    out.add_block_count(1)
    out.add_feed_forward_length(128)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(500000.0)
    out.add_vocab_size(32)
    if scaling != "none":
        out.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        out.add_rope_scaling_factor(4.0)
        out.add_rope_scaling_orig_ctx_len(1024)
    out.add_tensor("token_embd.weight", np.zeros((32, 64), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    rope = AutoConfig.from_pretrained("model", gguf_file=f"{scaling}.gguf").rope_parameters
    found[scaling] = rope["rope_type"]
    assert rope["rope_theta"] == 500000.0, rope  # the base is read
print(", ".join(f"{scaling}: {kind}" for scaling, kind in found.items()))
sys.exit(set(found.values()) != {"default"})
PY
