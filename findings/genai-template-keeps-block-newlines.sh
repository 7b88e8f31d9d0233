#!/bin/sh
# onnxruntime-genai renders a chat template with the line feeds that transformers takes out.
#
# Versions:  onnxruntime-genai 0.18.0, transformers 5.23.0 (jinja2 3.1.6)
# Expected:  the chat template of a model folder gives the same prompt in the runtime as in transformers, which sets
#            Jinja's trim_blocks and lstrip_blocks for every template.
# Behaviour: the runtime sets neither: each block tag on a line of its own leaves its line feed and its indentation in
#            the prompt. A template written over several lines is trained with one prompt and run with another.
# Output:    transformers: '<u>hi</u>\nend'; genai: '\n    <u>hi</u>\n\nend'
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 numpy==2.2.6 transformers==5.23.0 jinja2==3.1.6
venv/bin/python -W ignore - <<'PY' 2>/dev/null
import json
import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

alphabet = pre_tokenizers.ByteLevel.alphabet()
bytes_alone = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(sorted(alphabet))}, merges=[]))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_alone.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
tokenizer.chat_template = """{% for m in messages %}
    {% if true %}<u>{% endif %}{{ m['content'] }}</u>
{% endfor %}
end"""
tokenizer.save_pretrained("model")
decoder = {"filename": "none.onnx", "hidden_size": 8, "head_size": 8, "num_attention_heads": 1,
           "num_key_value_heads": 1, "num_hidden_layers": 1, "inputs": {}, "outputs": {}}
ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
model = {"type": "llama", "context_length": 64, "vocab_size": 300, "decoder": decoder, **ends}
Path("model/genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
messages = [{"role": "user", "content": "hi"}]
here = tokenizer.apply_chat_template(messages, tokenize=False)
there = og.Tokenizer("model").apply_chat_template(json.dumps(messages), add_generation_prompt=False)
print(f"transformers: {here!r}; genai: {there!r}")
sys.exit((here, there) != ("<u>hi</u>\nend", "\n    <u>hi</u>\n\nend"))
PY
