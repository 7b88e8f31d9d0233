#!/bin/sh
# transformers 4 opens a folder that transformers 5 wrote with the rotary base 10000, whatever the folder says.
#
# Versions:  transformers 5.23.0 writes, 4.57.6 reads
# Expected:  an unknown layout of config.json is refused, or rope_parameters is read, since the file names the base in
#            plain words.
# Behaviour: version 5 keeps rope_theta inside rope_parameters; version 4 finds no rope_theta at the top, takes its
#            default and keeps rope_parameters as an unused attribute. The model opens, and its rotary frequencies are
#            wrong.
# Output:    written: 500000.0; 5.23.0 reads 500000.0; 4.57.6 reads 10000.0
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
python3 -m venv older
older/bin/pip install --quiet transformers==4.57.6
venv/bin/python -W ignore - <<'PY' 2>/dev/null
from transformers import LlamaConfig

LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}).save_pretrained("model")
PY
cat > read.py <<'PY'
from transformers import AutoConfig

config = AutoConfig.from_pretrained("model")
print(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"])
PY
newer=$(venv/bin/python -W ignore read.py 2>/dev/null)
older=$(older/bin/python -W ignore read.py 2>/dev/null)
echo "written: 500000.0; 5.23.0 reads $newer; 4.57.6 reads $older"
[ "$newer" = 500000.0 ] && [ "$older" = 10000.0 ]
