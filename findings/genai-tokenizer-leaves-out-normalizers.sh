#!/bin/sh
# onnxruntime-genai cuts text without the normalizer that tokenizer.json names.
#
# Versions:  onnxruntime-genai 0.18.0, tokenizers 0.23.3
# Expected:  one tokenizer.json gives one sequence of ids for a text, whichever library reads it.
# Behaviour: og.Tokenizer skips the normalizer: a decomposed accent is not composed where the file says NFC, capitals
#            are kept where it says Lowercase. The ids are valid ones, no message is given, and the model reads
#            another text than it was trained on.
# Output:    NFC "cafe" + U+0301: tokenizers [268], genai [258, 69, 137, 224]; Lowercase "HELLO": tokenizers [260,
#            262], genai [40, 37, 44, 44, 47]
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 numpy==2.2.6 tokenizers==0.23.3
venv/bin/python - <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

decoder = {"filename": "none.onnx", "hidden_size": 8, "head_size": 8, "num_attention_heads": 1,
           "num_key_value_heads": 1, "num_hidden_layers": 1, "inputs": {}, "outputs": {}}
ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
model = {"type": "llama", "context_length": 64, "vocab_size": 300, "decoder": decoder, **ends}
as_described = True
for normalizer, text in ((normalizers.NFC(), "cafe\u0301"), (normalizers.Lowercase(), "HELLO")):
    ours = Tokenizer(models.BPE())
    ours.normalizer = normalizer
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False)
    ours.train_from_iterator(["caf\u00e9 hello world"] * 3, trainer)
    folder = Path(type(normalizer).__name__)
    folder.mkdir()
    ours.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "pad_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
    there = [int(token) for token in og.Tokenizer(str(folder)).encode(text)]
    print(f"{folder.name} {text!a}: tokenizers {ours.encode(text).ids}, genai {there}")
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.normalizer = normalizers.Sequence([])
    as_described = as_described and there != ours.encode(text).ids and there == bare.encode(text).ids
sys.exit(not as_described)
PY
