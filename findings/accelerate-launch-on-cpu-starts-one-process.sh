#!/bin/sh
# accelerate launch --cpu --num_processes 2 starts one process.
#
# Versions:  accelerate 1.15.0, torch 2.13.0
# Expected:  two processes over gloo, as torchrun --nproc-per-node 2 starts from the same script.
# Behaviour: one process runs, takes all the data and ends with code 0; the number that was asked for is dropped
#            without a message. A run that seems to be data parallel is not.
# Output:    accelerate launch: process 0 of 1 NO; torchrun: process 0 of 2 MULTI_CPU, process 1 of 2 MULTI_CPU
#
# Exit 0: as described. Exit 1: it changed. Needs Python 3.11 to 3.13 and a package index.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 accelerate==1.15.0 numpy==2.2.6
cat > where.py <<'PY'
from accelerate import Accelerator

here = Accelerator(cpu=True)
print(f"process {here.process_index} of {here.num_processes} {here.distributed_type.value}", flush=True)
PY
venv/bin/accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no where.py 2>/dev/null > launch
venv/bin/torchrun --nproc-per-node 2 where.py 2>/dev/null | sort > torchrun
echo "accelerate launch: $(paste -sd, launch); torchrun: $(paste -sd, torchrun)"
[ "$(cat launch)" = "process 0 of 1 NO" ] && [ "$(wc -l < torchrun)" = 2 ] && grep -q "process 1 of 2 MULTI_CPU" torchrun
