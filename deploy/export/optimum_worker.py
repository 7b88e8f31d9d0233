"""Run by the interpreter of another environment: optimum-onnx writes the graph of a plain checkpoint.

usage: optimum_worker.py MODEL_FOLDER OUT_FOLDER

Stands alone on purpose: edgestill is not installed where optimum-onnx is.
"""

import os
import sys
import threading


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


def leave_with_parent() -> None:
    """End this process when standard input closes: whoever asked is gone."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    leave_with_parent()
    main(*sys.argv[1:])
