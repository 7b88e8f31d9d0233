#!/bin/sh
# onnxruntime-genai leaves the end token out of a sequence alone in a batch, and keeps it and pads behind it beside a longer one.
#
# Versions:  onnxruntime-genai 0.18.0, transformers 5.23.0, torch 2.13.0
# Expected:  get_sequence gives one and the same answer for a prompt, with the end token or without it, whatever else
#            is in the batch.
# Behaviour: a row that ends when the whole batch ends has no end token; a row that ends earlier has it, and pad
#            tokens behind it up to the longest. Code that cuts at the end token counts one token more or less by the
#            company that a row is in.
# Output:    alone [239, 247]; beside a longer row [239, 247, 22, 0, 0, 0, 0, 0]; beside itself [239, 247]
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 \
  onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 numpy==2.2.6
cat > build.py <<'PY'
import subprocess
import sys

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def difference(name, vocab=300, **settings):
    """Largest difference of a logit between transformers and the graph that the builder made of the same folder."""
    config = LlamaConfig(vocab_size=vocab, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=512, max_position_embeddings=4096,
                         initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=0, **settings)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(name)
    words = Tokenizer(models.WordLevel({str(word): word for word in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="0", eos_token="1", pad_token="0").save_pretrained(name)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", name, "-o", f"{name}/onnx",
               "-p", "fp32", "-e", "cpu", "-c", "cache"]
    subprocess.run(command, check=True, capture_output=True)
    session = onnxruntime.InferenceSession(f"{name}/onnx/model.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(2, vocab, (1, 40))
    given = {"input_ids": ids, "attention_mask": np.ones((1, 40), np.int64), "position_ids": np.arange(40)[None]}
    for one in session.get_inputs():
        if one.name.startswith("past"):
            given[one.name] = np.zeros((1, 2, 0, 64), np.float32)
    names = {one.name for one in session.get_inputs()}
    found = session.run(["logits"], {name: value for name, value in given.items() if name in names})[0]
    with torch.no_grad():
        return float(np.abs(model(torch.tensor(ids)).logits.numpy() - found).max())
PY
cat > answers.py <<'PY'
import json
import sys

import numpy as np
import onnxruntime_genai as og
from build import difference

assert difference("model") < 1e-3  # the bundle is right


def answers(prompts, end):
    config = og.Config("model/onnx")
    config.overlay(json.dumps({"model": {"eos_token_id": end}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=12, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts if len(prompts) > 1 else prompts[0], dtype=np.int32))
    for _ in range(8):
        if not generator.is_done():
            generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)][4:] for row in range(len(prompts))]


short, longer = [5, 6, 7, 8], [9, 10, 11, 12]
free = answers([short], 1)[0]
end = free[2]
assert end not in free[:2] and end not in answers([longer], 1)[0]
alone, beside, twice = answers([short], end)[0], answers([short, longer], end)[0], answers([short, short], end)[0]
print(f"alone {alone}; beside a longer row {beside}; beside itself {twice}")
sys.exit(not (alone == twice == free[:2] and beside == [*free[:3], 0, 0, 0, 0, 0]))
PY
ORT_DISABLE_TELEMETRY=1 venv/bin/python -W ignore answers.py 2>/dev/null
