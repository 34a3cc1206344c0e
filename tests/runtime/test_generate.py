"""Generation: golden greedy text, pieces, stops, sampling, batches, and conversations that stop and go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_export import Bundle, OrtRunner, Sampling, generate, stream
from mamba_export.errors import UsageError
from mamba_export.runtime.loop import FunctionalLoop

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def runner(tiny_bundle: Path) -> OrtRunner:
    return OrtRunner(Bundle(tiny_bundle, check=False), threads=2)


@pytest.fixture(scope="module")
def goldens(tiny_checkpoint: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((tiny_checkpoint / "golden_greedy.json").read_text())
    return cases


@pytest.mark.parametrize("target", ["ort", "portable", "tensorrt"])
@pytest.mark.parametrize("step_only", [False, True])
def test_golden_greedy_text(
    target: str, step_only: bool, make_bundle: MakeBundle, goldens: list[dict[str, Any]]
) -> None:
    bundle = Bundle(make_bundle(target=target), check=False)
    runner = OrtRunner(bundle, threads=2, low_memory=step_only)
    for case in goldens:
        found = generate(runner, case["prompt"], max_tokens=len(case["greedy_ids"]), step_only=step_only)
        assert found.rows[0].prompt_ids == case["prompt_ids"]
        assert found.token_ids == case["greedy_ids"]
    assert ("prefill_session" in runner.__dict__) is not step_only


@pytest.mark.parametrize("model", ["mamba1-small", "mamba2-small"])
def test_golden_greedy_text_of_larger_models(
    model: str, make_bundle: MakeBundle, shared_checkpoint: Callable[[str], Path]
) -> None:
    folder = shared_checkpoint(model)
    runner = OrtRunner(Bundle(make_bundle(ckpt=folder), check=False), threads=2)
    for case in json.loads((folder / "golden_greedy.json").read_text()):
        assert generate(runner, case["prompt"], max_tokens=48, step_only=True).token_ids == case["greedy_ids"]


@pytest.mark.parametrize(
    "options", [{}, {"step_only": True}, {"chunk": 3}, {"ragged": True}, {"ragged": True, "chunk": 3}]
)
def test_a_batch_writes_what_its_rows_write_alone(
    options: dict[str, Any], make_bundle: MakeBundle, goldens: list[dict[str, Any]]
) -> None:
    options = dict(options)
    bundle = make_bundle(ragged=True) if options.pop("ragged", False) else make_bundle()
    runner = OrtRunner(Bundle(bundle, check=False), threads=2)
    prompts = [case["prompt_ids"] for case in goldens] + [[5]]
    alone = [generate(runner, prompt, max_tokens=12).token_ids for prompt in prompts]
    together = generate(runner, prompts, max_tokens=12, **options)
    assert [row.token_ids for row in together.rows] == alone
    assert alone[: len(goldens)] == [case["greedy_ids"][:12] for case in goldens]


def test_the_bound_loop_equals_the_functional_one(runner: OrtRunner) -> None:
    start = runner.initial_state(2)
    loop, plain = runner.step_loop(start, 2), FunctionalLoop(runner, start)
    for token in range(7, 12):
        ids = np.array([[token], [token * 3]])
        assert np.array_equal(loop.step(ids), plain.step(ids))
    one, other = loop.state_to_numpy(), plain.state_to_numpy()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not any(array.any() for array in runner.state_to_numpy(start).values())  # the start is left alone


def test_pieces_join_to_the_text(runner: OrtRunner) -> None:
    run = stream(runner, "def add(", max_tokens=20)
    pieces = list(run)
    result = run.result()
    assert "".join(piece.text for piece in pieces) == result.text
    assert [piece.token_id for piece in pieces] == result.token_ids
    assert pieces[-1].finish_reason == "length"
    assert result.timings.decode_tokens == 19


def test_a_stop_string_ends_the_text_before_it(runner: OrtRunner) -> None:
    whole = generate(runner, "The function returns", max_tokens=40).text
    stop = whole[20:29]
    run = stream(runner, "The function returns", max_tokens=40, stop=[stop, "never there"])
    shown = "".join(piece.text for piece in run)
    assert shown == run.result().text == whole[: whole.index(stop)]
    assert run.result().rows[0].finish_reason == "stop"


def test_end_of_text_ends_a_row_unless_it_is_ignored(make_bundle: MakeBundle, goldens: list[dict[str, Any]]) -> None:
    bundle = Bundle(make_bundle(), check=False)
    greedy = goldens[1]["greedy_ids"]
    end = next(i for i, token in enumerate(greedy) if i > 3 and token not in greedy[:i])
    bundle.manifest.eos_token_ids = [greedy[end]]
    runner = OrtRunner(bundle, threads=2)
    found = generate(runner, goldens[1]["prompt"], max_tokens=48, keep_state=True)
    assert (found.token_ids, found.rows[0].finish_reason) == (greedy[:end], "eos")
    assert found.snapshot is not None
    assert found.snapshot.tokens[0][-1] == greedy[end]
    assert generate(runner, goldens[1]["prompt"], max_tokens=48, ignore_eos=True).token_ids == greedy


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0.9, 50, 0.95, 0.01, seed=3)])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_conversation_goes_on_as_if_it_had_not_stopped(runner: OrtRunner, sampling: Sampling, cut: int) -> None:
    whole = generate(runner, "import os\n", max_tokens=16, sampling=sampling, ignore_eos=True)
    first = generate(runner, "import os\n", max_tokens=cut, sampling=sampling, ignore_eos=True, keep_state=True)
    rest = generate(runner, max_tokens=16 - cut, sampling=sampling, ignore_eos=True, resume=first.snapshot)
    assert first.token_ids + rest.token_ids == whole.token_ids


def test_one_state_serves_many_prompts(runner: OrtRunner) -> None:
    kept = generate(runner, "import os\n", max_tokens=0, keep_state=True).snapshot
    together = generate(runner, ["import sys\n", "def f(x):\n"], max_tokens=8, resume=kept)
    for row, prompt in zip(together.rows, ["import sys\n", "def f(x):\n"], strict=True):
        assert row.token_ids == generate(runner, prompt, max_tokens=8, resume=kept).token_ids
    both = generate(runner, ["a", "b"], max_tokens=1, keep_state=True).snapshot
    with pytest.raises(UsageError, match="holds 2 rows, there are 3"):
        generate(runner, ["a", "b", "c"], resume=both)


def test_seeds_repeat_and_differ(runner: OrtRunner) -> None:
    def draw(seed: int | None) -> list[int]:
        return generate(runner, "def ", max_tokens=24, sampling=Sampling(temperature=1.5, seed=seed)).token_ids

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in (1, 2, None)}) == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([4096], {}, "token id 4096"),
        ([-1], {}, "token id -1"),
        ("a", {"max_tokens": -1}, "max-tokens"),
        ("a", {"chunk": 0}, "chunk"),
    ],
)
def test_bad_arguments(runner: OrtRunner, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(runner, prompt, **options)


def test_an_empty_prompt_starts_at_end_of_text(runner: OrtRunner) -> None:
    assert generate(runner, "", max_tokens=4).token_ids == generate(runner, [0], max_tokens=4).token_ids


def test_command(cli: Callable[..., Any], tiny_bundle: Path, tmp_path: Path, goldens: list[dict[str, Any]]) -> None:
    case, state = goldens[0], tmp_path / "talk.state"
    first = cli("generate", tiny_bundle, "--prompt", case["prompt"], "-n", 20, "--json", "--save-state", state)
    assert first.returncode == 0, first.stderr
    rest = cli("generate", tiny_bundle, "--load-state", state, "-n", 28, "--json", "--step-only")
    rows = [json.loads(run.stdout)["rows"][0] for run in (first, rest)]
    assert rows[0]["token_ids"] + rows[1]["token_ids"] == case["greedy_ids"]
    state.write_bytes(state.read_bytes()[:1000])
    damaged = cli("generate", tiny_bundle, "--load-state", state)
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert "truncated" in damaged.stderr
    assert "hint:" in damaged.stderr
