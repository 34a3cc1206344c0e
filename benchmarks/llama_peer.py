"""What llama.cpp does in its own environment: quantize a GGUF, and measure perplexity through its logits.

PYTHON llama_peer.py quantize IN OUT Q8_0|Q4_0|Q4_K_M
PYTHON llama_peer.py perplexity GGUF DATA --window 1024 --windows 64 --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from typing import Any

import numpy as np

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}


def quantize(source: str, out: str, kind: str) -> None:
    """Write ``out`` in the file type of that name."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp did not quantize {source}")


def perplexity(path: str, data: str, window: int, windows: int, threads: int) -> dict[str, Any]:
    """Windows that do not overlap, each from an empty state; every position predicts the token after it."""
    import llama_cpp

    sizes = {"n_ctx": window, "n_batch": window, "n_ubatch": 512}
    model = llama_cpp.Llama(path, **sizes, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False)
    tokens = np.fromfile(data, "<u2").astype(np.int64)
    each = []
    for i in range(min(windows, (tokens.size - 1) // window)):
        row = tokens[i * window : i * window + window + 1]
        model.reset()
        model.eval(row[:-1].tolist())
        logits = np.array(model.scores[:window], np.float64)
        logits -= logits.max(-1, keepdims=True)
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(window), row[1:]]
        each.append(float(nll.mean()))
    return {"nll": each, "version": llama_cpp.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("quantize")
    command.add_argument("source")
    command.add_argument("out")
    command.add_argument("kind", choices=TYPES)
    command = commands.add_parser("perplexity")
    command.add_argument("path")
    command.add_argument("data")
    command.add_argument("--window", type=int, default=1024)
    command.add_argument("--windows", type=int, default=64)
    command.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    if options.pop("command") == "quantize":
        quantize(**options)
    else:
        print(json.dumps(perplexity(**options)))


if __name__ == "__main__":
    main()
