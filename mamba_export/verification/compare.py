"""Compare a bundle with its checkpoint through Polygraphy's comparator.

A scenario is a way to walk through a sequence: in one piece, in random pieces, in ragged rows, and then 32 steps with
given tokens. Each is run by the bundle's runner and by the torch model on the same weights; logits and every state
are compared.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_export.bundle import PREFILL, Bundle
from mamba_export.checkpoint import Checkpoint, open_checkpoint
from mamba_export.errors import UsageError
from mamba_export.extras import require
from mamba_export.progress import Progress, silent
from mamba_export.quantized import QuantizedModel
from mamba_export.runtime.base import Runner
from mamba_export.verification.report import TOLERANCES, OutputError, VerificationReport

STEPS = 32
_ORACLE = "checkpoint"


@dataclass(frozen=True)
class Scenario:
    """One walk through token ids.

    Attributes:
        name: for the report.
        ids: int64 [B, L], the prompt.
        pieces: lengths that add up to L; the prompt is run in these pieces.
        step_ids: int64 [B, S], the tokens of S steps after it.
        seq_lens: int32 [B], for ragged rows (one piece then).
    """

    name: str
    ids: NDArray[np.int64]
    pieces: list[int]
    step_ids: NDArray[np.int64]
    seq_lens: NDArray[np.int32] | None = None

    def run(self, runner: Runner) -> OrderedDict[str, NDArray[Any]]:
        """Walk; returns ``logits`` of the prompt, ``logits of steps``, and every state after each of the two."""
        state = runner.initial_state(self.ids.shape[0])
        found: OrderedDict[str, NDArray[Any]] = OrderedDict()
        parts, start = [], 0
        for piece in self.pieces:
            logits, state = runner.prefill(self.ids[:, start : start + piece], state, self.seq_lens)
            parts.append(self._last_valid(logits))
            start += piece
        found["logits"] = np.concatenate(parts, axis=1)
        found.update({f"present_{k}": v for k, v in runner.state_to_numpy(state).items()})
        rows = []
        for t in range(self.step_ids.shape[1]):
            logits, state = runner.step(self.step_ids[:, t : t + 1], state)
            rows.append(logits)
        if rows:
            found["logits of steps"] = np.concatenate(rows, axis=1)
            found.update({f"present_{k} after steps": v for k, v in runner.state_to_numpy(state).items()})
        return found

    def _last_valid(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[B, 1, V] at the last valid position: what graphs with ``last`` and with ``all`` logits have in common."""
        if logits.shape[1] == 1 or self.seq_lens is None:
            return logits[:, -1:]
        return np.take_along_axis(logits, (self.seq_lens - 1).astype(np.int64)[:, None, None], axis=1)

    def of_rows(self, count: int) -> Scenario:
        """The first ``count`` rows alone."""
        lens = None if self.seq_lens is None else self.seq_lens[:count]
        return replace(self, ids=self.ids[:count], step_ids=self.step_ids[:count], seq_lens=lens)


def make_scenarios(vocab_size: int, ragged: bool, seed: int = 0) -> list[Scenario]:
    """The scenarios of every verification, on random tokens."""
    rng = np.random.default_rng(seed)

    def ids(batch: int, length: int) -> NDArray[np.int64]:
        return rng.integers(0, vocab_size, (batch, length), dtype=np.int64)

    cuts = np.sort(rng.choice(np.arange(1, 61), size=4, replace=False))
    pieces = np.diff([0, *cuts, 61]).tolist()
    scenarios = [
        Scenario("prompt of 67, 32 steps", ids(2, 67), [67], ids(2, STEPS)),
        Scenario(f"prompt in pieces {'+'.join(map(str, pieces))}", ids(1, 61), pieces, ids(1, 1)),
        Scenario("single tokens", ids(3, 2), [1, 1], ids(3, 1)),
    ]
    if ragged:
        lens = np.array([19, 1, 7, 2], np.int32)
        scenarios.append(Scenario("ragged rows 19, 1, 7, 2", ids(4, 19), [19], ids(4, 2), lens))
    return scenarios


def verify(
    bundle: str | Path | Bundle,
    ckpt: str | Path | None = None,
    *,
    device: str = "cpu",
    runtime: str = "ort",
    plugin: str | Path | None = None,
    progress: Progress = silent,
) -> VerificationReport:
    """Compare the bundle at ``bundle`` with the checkpoint at ``ckpt``.

    In ONNX Runtime; or, with ``runtime`` ``tensorrt`` or ``tensorrt-rtx``, its engines with the checkpoint, ONNX
    Runtime on the CPU with the checkpoint, and the engines with ONNX Runtime. Without a checkpoint the engines are
    compared with ONNX Runtime alone, which needs no torch.

    Args:
        bundle: folder of the bundle, or an open one.
        ckpt: folder, file or hub id of the checkpoint it was made from; may be left out for engines.
        device: of ONNX Runtime: ``cpu`` or ``cuda``.
        runtime: ``ort``, ``tensorrt`` or ``tensorrt-rtx``.
        plugin: plugin library of the engines.
        progress: gets told what is being done.

    Returns:
        The report; check its ``ok`` or call ``raise_if_failed``.

    Raises:
        UsageError: the checkpoint is another model, or none was given and there are no engines to compare.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    if ckpt is None and runtime != "ort":
        return _engines_alone(opened, runtime, plugin, progress)
    if ckpt is None:
        raise UsageError("there is nothing to compare with", "name the checkpoint: --ckpt CKPT")
    require("torch", "polygraphy", extra="export", purpose="verify")
    if opened.manifest.quantization is not None:
        engines = "; engines with the graphs: leave out --ckpt" if runtime != "ort" else ""
        raise UsageError(
            f"{opened.path} is quantized: it does not compute what {ckpt} computes",
            f"how far it is from it: mamba-export perplexity {opened.path} --data FILE --ckpt {ckpt}{engines}",
        )
    with open_checkpoint(ckpt) as checkpoint:
        if checkpoint.spec != opened.spec:
            changed = [k for k, v in checkpoint.spec.to_dict().items() if opened.manifest.spec.get(k) != v]
            raise UsageError(
                f"{ckpt} is not the checkpoint of this bundle: {', '.join(changed)} differ",
                f"the bundle was made from '{opened.manifest.checkpoint.get('name')}'",
            )
        return verify_bundle(opened, checkpoint, device=device, runtime=runtime, plugin=plugin, progress=progress)


def verify_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    quantized: QuantizedModel | None = None,
    *,
    device: str = "cpu",
    runtime: str = "ort",
    plugin: str | Path | None = None,
    progress: Progress = silent,
) -> VerificationReport:
    """:func:`verify` on things already open; a quantized bundle is compared with the same quantized model in torch."""
    require("polygraphy", "onnxruntime", extra="export", purpose="verify")
    from mamba_export.runtime.ort import OrtRunner

    threads = engine_threads(checkpoint.n_parameters)
    if runtime != "ort":
        from mamba_export.runtime.trt import TrtRunner

        both: dict[str, Runner] = {
            "": TrtRunner(bundle, runtime, plugin),
            "ONNX Runtime: ": OrtRunner(bundle, "cpu", threads),
        }
        mutual = {"against ONNX Runtime: ": ("", "ONNX Runtime: ")}
        return compare_with_checkpoint(both, f"{runtime} and ONNX Runtime", bundle, checkpoint, progress, mutual)
    runners: dict[str, Runner] = {"": OrtRunner(bundle, device, threads)}
    if bundle.graph(PREFILL, device) != bundle.file(PREFILL):
        runners["standard graphs: "] = OrtRunner(bundle, device, threads, suited=False)
    return compare_with_checkpoint(
        runners, f"ONNX Runtime, {device}", bundle, checkpoint, progress, quantized=quantized
    )


def _engines_alone(bundle: Bundle, runtime: str, plugin: str | Path | None, progress: Progress) -> VerificationReport:
    """Engines against ONNX Runtime on the same graphs."""
    require("polygraphy", "onnxruntime", extra="export", purpose="verify")
    from mamba_export.runtime.ort import OrtRunner
    from mamba_export.runtime.trt import TrtRunner

    runners: dict[str, Runner] = {"": TrtRunner(bundle, runtime, plugin), _ORACLE: OrtRunner(bundle)}
    kind = bundle.manifest.dtype if bundle.manifest.quantization is None else "quantized"
    report = VerificationReport(f"{runtime} against ONNX Runtime", TOLERANCES[kind])
    return _compare(runners, {"": ("", _ORACLE)}, report, bundle, progress)


def compare_with_checkpoint(
    runners: Runner | dict[str, Runner],
    runtime: str,
    bundle: Bundle,
    checkpoint: Checkpoint,
    progress: Progress = silent,
    mutual: Mapping[str, tuple[str, str]] | None = None,
    quantized: QuantizedModel | None = None,
) -> VerificationReport:
    """Run every scenario through the bundle's runners and through torch, and compare.

    Args:
        runners: whatever runs the bundle; several under a prefix that names each in the report.
        runtime: its name, for the report.
        bundle: tells dtype, layout and whether rows may be ragged.
        checkpoint: the truth.
        progress: gets told what is being done.
        mutual: further comparisons: their prefix in the report → the prefixes of two runners.
        quantized: the truth of a quantized bundle.
    """
    from mamba_export.runtime.torch_runner import TorchRunner

    runners = runners if isinstance(runners, dict) else {"": runners}
    report = VerificationReport(runtime, TOLERANCES[bundle.manifest.dtype if quantized is None else "quantized"])
    pairs = {prefix: (prefix, _ORACLE) for prefix in runners} | dict(mutual or {})
    with torch_threads(checkpoint.n_parameters):
        oracle = TorchRunner(checkpoint, bundle.manifest.dtype, "fp32", bundle.target.ssm_layout, quantized)
        return _compare({**runners, _ORACLE: oracle}, pairs, report, bundle, progress)


def _compare(
    runners: Mapping[str, Runner],
    pairs: Mapping[str, tuple[str, str]],
    report: VerificationReport,
    bundle: Bundle,
    progress: Progress,
) -> VerificationReport:
    """Every scenario by every runner, and the comparisons of ``pairs`` (see ``compare_walks``) into ``report``."""
    from mamba_export.verification.polygraphy_runner import compare_walks

    rows = min(getattr(runner, "max_batch", 1 << 30) for runner in runners.values())
    scenarios = [s.of_rows(rows) for s in make_scenarios(bundle.spec.vocab_size, bundle.manifest.ragged)]
    with progress.stage("verify", total=len(scenarios)) as tick:
        for scenario in scenarios:

            def judge(
                prefix: str, name: str, found: NDArray[Any], wanted: NDArray[Any], walk: str = scenario.name
            ) -> bool:
                report.errors.append(OutputError.of(prefix + walk, name, found, wanted, report.tolerance))
                return report.errors[-1].ok

            compare_walks(scenario, runners, pairs, judge)
            tick(1)
    return report


def engine_threads(parameters: int) -> int | None:
    """One thread for small models, where handing out work costs more than the work; else the engine's choice."""
    return 1 if parameters < 100_000_000 else None


@contextlib.contextmanager
def torch_threads(parameters: int) -> Iterator[None]:
    """:func:`engine_threads` for torch, while it lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(engine_threads(parameters) or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
