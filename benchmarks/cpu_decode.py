"""(b), (d) One token and a prefill on the CPU: stock ONNX Runtime against transformers, llama.cpp and OpenVINO.

    python benchmarks/cpu_decode.py [--cache FOLDER] [--only NAME ...] [--rounds 4]

One model (Mamba-1, 768 × 24, vocabulary 50,280, float32, random weights), one run: all contenders are loaded, each in
its own process, and take turns with a pause between them; what counts is the median of a contender's best round.
Peers are set up on first use (see peers.py); one that does not install is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import machine
import peers

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("mamba-export", "transformers", "llama.cpp", "openvino")
SHAPE = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}


def make_model(cache: Path) -> Path:
    """The checkpoint that all contenders run, saved by transformers."""
    folder = cache / "models" / "mamba-768x24"
    if not (folder / "config.json").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        transformers.MambaForCausalLM(transformers.MambaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def make_bundle(model: Path, cache: Path) -> Path:
    """The bundle of target ``ort``, made anew: the exporter may have changed since the last run."""
    sys.path.insert(1, str(ROOT))
    from mamba_export.export import export_onnx

    out = cache / "bundles" / f"{model.name}-ort"
    out.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(model, out, target="ort", verify=False, force=True)
    return out


class Process:
    """A contender that waits for its turns."""

    def __init__(self, name: str, python: str, path: Path, threads: int) -> None:
        command = [python, str(ROOT / "benchmarks" / "contenders.py"), name, str(path), "--threads", str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)
        self.name, self.version = name, self._read()["version"]

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, request: str) -> list[float]:
        """Times of one turn, in milliseconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        times: list[float] = self._read()
        return times

    def _read(self) -> Any:
        """The next JSON line; what libraries print is passed over."""
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise RuntimeError(f"it ended:\n{self.process.stderr.read()[-1500:]}")


def start(name: str, model: Path, options: argparse.Namespace) -> Process:
    """Set up and load one contender."""
    peer = {"llama.cpp": "llamacpp", "openvino": "openvino"}.get(name)
    python = peers.python_of(peer, options.cache) if peer else sys.executable
    if python is None:
        raise RuntimeError("it does not install here")
    path = model
    if name == "mamba-export":
        path = make_bundle(model, options.cache)
    elif name == "llama.cpp":
        path = peers.gguf_of(model, options.cache)
    return Process(name, python, path, options.threads)


def take_turns(running: list[Process], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median of the best round of every contender, in milliseconds."""
    best: dict[str, dict[str, float]] = {process.name: {} for process in running}
    for _ in range(options.rounds):
        for key, request in (("prefill", f"prefill {options.length} 2"), ("step", "step 40")):
            for process in running:
                time.sleep(options.pause)  # threads that wait for work by spinning must have gone to sleep
                took = statistics.median(process.ask(request))
                best[process.name][key] = min(took, best[process.name].get(key, took))
    return best


def report(running: list[Process], best: dict[str, dict[str, float]], length: int) -> None:
    """The table, as Markdown."""
    own = best.get(NAMES[0])
    print(f"\n| contender | prefill of {length}, ms | one step, ms | mamba-export is faster: prefill, step |")
    print("|---|---|---|---|")
    for process in running:
        times = best[process.name]
        ratio = "" if own is None else " · ".join(f"{times[k] / own[k]:.2f} ×" for k in ("prefill", "step"))
        print(f"| {process.name} ({process.version}) | {times['prefill']:.0f} | {times['step']:.1f} | {ratio} |")


def main(names: tuple[str, ...] = NAMES) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=peers.default_cache())
    parser.add_argument("--only", nargs="+", choices=NAMES, default=names)
    parser.add_argument("-p", "--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between turns")
    options = parser.parse_args()
    model = make_model(options.cache)
    running: list[Process] = []
    absent = []
    try:
        for name in options.only:
            try:
                running.append(start(name, model, options))
            except (RuntimeError, subprocess.CalledProcessError) as error:
                absent.append(f"{name} is left out: {error}")
        print(f"{machine.describe()}; {options.threads} threads, best of {options.rounds} rounds")
        report(running, take_turns(running, options), options.length)
        print("\n".join(absent))
    finally:
        for process in running:
            process.__exit__(None, None, None)


if __name__ == "__main__":
    main()
