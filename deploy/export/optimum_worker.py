"""Run by the interpreter of another environment: optimum-onnx writes the graph of a plain checkpoint.

usage: optimum_worker.py MODEL_FOLDER OUT_FOLDER

Stands alone on purpose: edgestill is not installed where optimum-onnx is.
"""

import sys


def main(source: str, out: str) -> None:
    """Write ``out/model.onnx``: fp32, with the KV cache as inputs and outputs."""
    from optimum.exporters.onnx import main_export

    main_export(
        model_name_or_path=source,
        output=out,
        task="text-generation-with-past",
        library_name="transformers",
        device="cpu",
        dtype="fp32",
        do_validation=False,  # parity is proven by edgestill, in the runtime of the device
        trust_remote_code=False,
        local_files_only=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
