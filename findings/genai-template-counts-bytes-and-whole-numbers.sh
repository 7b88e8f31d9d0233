#!/bin/sh
# onnxruntime-genai's chat templates slice text by bytes, divide into whole numbers and print none as nothing.
#
# Versions:  onnxruntime-genai 0.18.0, jinja2 3.1.6
# Expected:  an expression of a chat template has one value, the one that Jinja gives it where the template was
#            written and trained with.
# Behaviour: the first two characters of a text are its first two bytes (half a letter or none beyond ASCII), 3 / 2 is
#            1, -7 // 2 is -3 and none is empty. A template that shortens a message or counts its turns gives another
#            prompt on the device, for some texts alone.
# Output:    "\u00e9\u00e9\u00e9"[:2]: jinja2 two letters, genai one; 3 / 2: 1.5 and 1; -7 // 2: -4 and -3; none: None
#            and nothing
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 numpy==2.2.6 tokenizers==0.23.3 jinja2==3.1.6
venv/bin/python - <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_alone = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
Path("model").mkdir()
bytes_alone.save("model/tokenizer.json")
Path("model/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
decoder = {"filename": "none.onnx", "hidden_size": 8, "head_size": 8, "num_attention_heads": 1,
           "num_key_value_heads": 1, "num_hidden_layers": 1, "inputs": {}, "outputs": {}}
ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
model = {"type": "llama", "context_length": 64, "vocab_size": 300, "decoder": decoder, **ends}
Path("model/genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
runtime, jinja = og.Tokenizer("model"), ImmutableSandboxedEnvironment()
messages = [{"role": "user", "content": "\u00e9\u00e9\u00e9"}]
expected = {
    "{{ messages[0]['content'][:2] }}": ("\u00e9\u00e9", "\u00e9"),
    "{{ 3 / 2 }}": ("1.5", "1"),
    "{{ -7 // 2 }}": ("-4", "-3"),
    "{{ none }}": ("None", ""),
}
found = {}
for template in expected:
    there = runtime.apply_chat_template(json.dumps(messages), template_str=template, add_generation_prompt=False)
    found[template] = (jinja.from_string(template).render(messages=messages), there)
    print(f"{template}: jinja2 {found[template][0]!a}, genai {there!a}")
sys.exit(found != expected)
PY
