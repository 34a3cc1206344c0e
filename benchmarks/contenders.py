"""One contender in a process of its own: loads a model, then times prefill and step as its standard input asks.

    python benchmarks/contenders.py NAME PATH --threads 2

Each line read is ``prefill LENGTH COUNT`` or ``step COUNT``; each answer is one JSON line, the times in milliseconds.
Every turn starts with untimed runs, because the caches and threads have served another contender in between.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

WARM_UP = 3


class Contender(Protocol):
    """A loaded model."""

    version: str

    def prefill(self, length: int) -> None:
        """Run ``length`` tokens from an empty state, logits of the last."""

    def step(self) -> None:
        """Run one more token on the state that is there."""


class Bundle:
    """A bundle in stock ONNX Runtime."""

    def __init__(self, path: str, threads: int, library: Path | None = None) -> None:
        import numpy as np
        import onnxruntime

        from mamba_export.bundle import Bundle as Folder
        from mamba_export.runtime import OrtRunner

        self.np, self.version = np, f"onnxruntime {onnxruntime.__version__}"
        self.runner = OrtRunner(Folder(Path(path), check=False), threads=threads, library=library)
        self.zero = self.runner.initial_state(1)
        self.state, self.loop = self.zero, None

    def prefill(self, length: int) -> None:
        ids = self.np.arange(length, dtype=self.np.int64)[None] % 1000
        _, self.state = self.runner.prefill(ids, self.zero)
        self.loop = None

    def step(self) -> None:
        if self.loop is None:
            self.loop = self.runner.step_loop(self.state, 1)
        self.loop.step(self.np.array([[7]]))


class WithLibrary(Bundle):
    """A bundle of target ``tensorrt`` in ONNX Runtime with this project's custom-op library."""

    def __init__(self, path: str, threads: int) -> None:
        from mamba_export.plugins import ort_library

        found = ort_library.find()
        if found is None:
            sys.exit("no library: python -m mamba_export.plugins.ort_library --onnxruntime-root DIR")
        super().__init__(path, threads, found)


class Transformers:
    """The checkpoint in torch, through transformers' own modules."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.version = torch, f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def prefill(self, length: int) -> None:
        ids = self.torch.arange(length)[None] % 1000
        with self.torch.inference_mode():
            self.cache = self.model(ids, use_cache=True, logits_to_keep=1).cache_params

    def step(self) -> None:
        with self.torch.inference_mode():
            ids = self.torch.tensor([[7]])
            self.cache = self.model(ids, cache_params=self.cache, use_cache=True).cache_params


class Llama:
    """The float32 GGUF in llama.cpp."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        sizes = {"n_ctx": 8192, "n_batch": 512, "n_ubatch": 512}
        self.model = llama_cpp.Llama(path, **sizes, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, length: int) -> None:
        self.model.reset()
        self.model.eval([i % 1000 for i in range(length)])

    def step(self) -> None:
        self.model.eval([7])


class OpenVino:
    """optimum-intel's export, in OpenVINO."""

    def __init__(self, path: str, threads: int) -> None:
        import openvino
        import torch
        from optimum.intel import OVModelForCausalLM

        self.torch, self.version = torch, f"openvino {openvino.__version__.split('-')[0]}"
        folder = Path(path).with_name(f"{Path(path).name}-openvino")
        config = {"INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32"}
        if not folder.exists():
            OVModelForCausalLM.from_pretrained(path, export=True, compile=False, load_in_8bit=False).save_pretrained(
                folder
            )
        self.model = OVModelForCausalLM.from_pretrained(folder, ov_config=config)

    def prefill(self, length: int) -> None:
        ids = self.torch.arange(length)[None] % 1000
        position = self.torch.arange(self.model.config.conv_kernel)
        self.cache = self.model(ids, use_cache=True, cache_position=position).cache_params

    def step(self) -> None:
        ids, position = self.torch.tensor([[7]]), self.torch.tensor([self.model.config.conv_kernel])
        self.cache = self.model(ids, cache_params=self.cache, use_cache=True, cache_position=position).cache_params


CONTENDERS: dict[str, Callable[[str, int], Contender]] = {
    "mamba-export": Bundle,
    "library": WithLibrary,
    "transformers": Transformers,
    "llama.cpp": Llama,
    "openvino": OpenVino,
}


def timed(run: Callable[[], None], count: int) -> list[float]:
    """Milliseconds of each of ``count`` runs."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def answer(contender: Contender, words: list[str]) -> list[float]:
    """Times of one request; a step continues a sequence of 8 tokens."""
    if words[0] == "prefill":
        length = int(words[1])
        contender.prefill(length)
        return timed(lambda: contender.prefill(length), int(words[2]))
    contender.prefill(8)
    timed(contender.step, WARM_UP)
    return timed(contender.step, int(words[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
    contender = CONTENDERS[options.name](options.path, options.threads)
    print(json.dumps({"version": contender.version}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(contender, line.split())), flush=True)


if __name__ == "__main__":
    main()
