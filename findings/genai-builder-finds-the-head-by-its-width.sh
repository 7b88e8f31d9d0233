#!/bin/sh
# onnxruntime-genai's model builder takes any linear that is as wide as the vocabulary for the language model head.
#
# Versions:  onnxruntime-genai 0.18.0, transformers 5.23.0, torch 2.13.0
# Expected:  the head is the module called lm_head; what else happens to have as many outputs as there are tokens is
#            not touched.
# Behaviour: where the vocabulary is as large as the feed-forward width, or as the hidden size, that linear is taken
#            for the head as well. The builder succeeds, and the graph's logits are wrong, tied or not. Small and
#            trimmed vocabularies meet this.
# Output:    largest difference of a logit: 300 tokens 0.0000, 512 tokens as the feed-forward width 8.4480, 256 tokens
#            as the hidden size 7.7905
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
ORT_DISABLE_TELEMETRY=1 venv/bin/python -W ignore - <<'PY' 2>/dev/null
import sys

from build import difference

names = {300: "300 tokens", 512: "512 tokens as the feed-forward width", 256: "256 tokens as the hidden size"}
found = {vocab: difference(f"model-{vocab}", vocab=vocab, tie_word_embeddings=False) for vocab in names}
print("largest difference of a logit: " + ", ".join(f"{names[vocab]} {value:.4f}" for vocab, value in found.items()))
sys.exit(not (found[300] < 1e-3 and found[512] > 0.1 and found[256] > 0.1))
PY
