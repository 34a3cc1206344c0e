"""The C++ program of examples/jetson: its tokenizer and sampler by themselves, and the whole of it on a stand-in.

The whole program is compiled against every version of TensorRT's headers that is found and run against a stand-in for
TensorRT's library (standin/nvinfer.cpp), which has this process compute what an engine would: its text is the golden
text of the checkpoint. On TensorRT itself and on a GPU it has not been run here.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import HERE, CopyBundle
from tests.engine.served import STRICT, Served, compile_nvinfer, compiler, header_folders, need_headers

SOURCES = Path(__file__).parents[2] / "examples" / "jetson"
# -- tokenizer and sampler --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``parts(stdin, "encode", path)``: run standin/parts.cpp."""
    program = tmp_path_factory.mktemp("parts") / "parts"
    sources = [HERE / "parts.cpp", *(SOURCES / name for name in ("json.cpp", "tokenizer.cpp", "sampler.cpp"))]
    subprocess.run([compiler(), *STRICT, f"-I{SOURCES}", "-o", program, *sources], check=True)

    def run(text: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *map(str, arguments)], input=text, capture_output=True, text=True, check=False)

    return run


TEXTS = [
    "def read_file(path):\n    return open(path).read()\n",
    "it's  they'll\t\n\n  we'd 've x' 's",
    "naïve Straße 東京 12½ ٣٤ Ⅷ",
    "emoji 👩‍👩‍👧 and\u00a0no-break\u2003space\r\n",
    "<|endoftext|>and again<|endoftext|><|endoftext",
    "    \n\n    x   ",
    " ",
    "'",
    "a" * 300,
]


def same_as_tokenizers(parts: Any, path: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(path))
    lines = "".join(text.encode().hex() + "\n" for text in texts)
    done = parts(lines, "encode", path)
    assert done.returncode == 0, done.stderr
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    wanted = [list(reference.encode(text, add_special_tokens=False).ids) for text in texts]
    for text, ids, truth in zip(texts, found, wanted, strict=True):
        assert ids == truth, repr(text)
    back = parts("".join(" ".join(map(str, ids)) + "\n" for ids in wanted), "decode", path).stdout.splitlines()
    for ids, line in zip(wanted, back, strict=True):
        assert bytes.fromhex(line).decode() == reference.decode(ids, skip_special_tokens=True)


def test_the_tokenizer_is_that_of_the_tokenizers_package(parts: Any, tiny_checkpoint: Path) -> None:
    same_as_tokenizers(parts, tiny_checkpoint / "tokenizer.json", TEXTS)


def test_the_tokenizer_on_random_text(parts: Any, tiny_checkpoint: Path) -> None:
    letters = st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn", "Co"))
    pieces = st.one_of(st.text(letters, max_size=6), st.sampled_from([" ", "  ", "\n", "'s", "'re", "12", "_(", "é"]))

    @settings(max_examples=20)
    @given(st.lists(st.lists(pieces, max_size=12).map("".join), min_size=30, max_size=60))
    def check(texts: list[str]) -> None:
        same_as_tokenizers(parts, tiny_checkpoint / "tokenizer.json", texts)

    check()


def test_other_tokenizers_are_refused(parts: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    known = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model": {"type": "Unigram", "vocab": []}}, "not byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ]
    for change, message in changes:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**known, **change}))
        done = parts("", "encode", tmp_path / "tokenizer.json")
        assert done.returncode == 1
        assert message in done.stderr
    for text in ("", "{", '{"model": {"type": "BPE"', '{"a": "\\ud800"}', "[" * 1000, '{"model": nul'):
        (tmp_path / "tokenizer.json").write_text(text)
        assert "not JSON" in parts("", "encode", tmp_path / "tokenizer.json").stderr


def test_greedy_and_sampled_choices(parts: Any) -> None:
    logits = np.array([0.5, 2.0, -1.0, 1.0, 2.0])
    line = " ".join(map(str, logits))
    assert set(parts(line, "sample", 0, 0, 1, 5).stdout.split()) == {"1"}  # the first of equals
    draws = 20_000
    found = np.bincount([int(word) for word in parts(line, "sample", 0.7, 0, 3, draws).stdout.split()], minlength=5)
    wanted = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    assert np.abs(found / draws - wanted).max() < 0.015
    best = np.bincount([int(word) for word in parts(line, "sample", 1, 3, 3, draws).stdout.split()], minlength=5)
    assert best[0] == best[2] == 0 and best[3] > 0
    assert parts(line, "sample", 1, 0, 3, 50).stdout == parts(line, "sample", 1, 0, 3, 50).stdout


# -- the whole program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=header_folders() or [None], ids=lambda folder: folder and folder.parent.name)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, standin_libraries: Path) -> Path:
    """mamba_generate, built by its own CMakeLists.txt against one version's headers, with warnings as errors."""
    include = need_headers(request.param)
    folder = tmp_path_factory.mktemp("jetson")
    cudart, nvinfer = standin_libraries / "libcudart.so", compile_nvinfer(folder, include, standin_libraries)
    configure = ["cmake", "-S", SOURCES, "-B", folder / "build", "-DWARNINGS_AS_ERRORS=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    configure += [f"-DTENSORRT_INCLUDE_DIR={include}", f"-DTENSORRT_LIBRARY={nvinfer}"]
    for command in ([*configure, f"-DCUDA_cudart_LIBRARY={cudart}"], ["cmake", "--build", folder / "build"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build" / "mamba_generate"


@pytest.fixture
def golden(tiny_checkpoint: Path) -> Any:
    return json.loads((tiny_checkpoint / "golden_greedy.json").read_text())


@pytest.mark.parametrize("single", [True, False], ids=["one engine", "two engines"])
def test_its_text_is_the_golden_one(
    program: Path, copy_bundle: CopyBundle, golden: Any, tmp_path: Path, single: bool
) -> None:
    bundle = copy_bundle(dtype="fp32")
    served = Served(bundle, tmp_path / "engines", single, longest=4)
    tokenizer = ["--tokenizer", bundle.file("tokenizer.json"), "--eos", "-1"]
    for case in golden:
        done = served.run(
            program, "--engines", tmp_path / "engines", *tokenizer, "--prompt", case["prompt"], "-n", "24"
        )
        assert done.returncode == 0, done.stderr
        from tokenizers import Tokenizer

        reference = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        assert done.stdout == reference.decode(case["greedy_ids"][:24], skip_special_tokens=True) + "\n"
        assert "CUDA graphs" in done.stderr
    steps = 0 if single else 1
    assert served.runs[:3] == [(0, 4), (0, 4), (0, 1)]  # the first prompt has 9 tokens
    assert served.runs[3:26] == [(steps, 1)] * 23  # a step a token, also once they come from graphs


def test_token_ids_graphs_or_not_and_sampling(
    program: Path, copy_bundle: CopyBundle, golden: Any, tmp_path: Path
) -> None:
    bundle = copy_bundle(dtype="fp16", ragged=True)
    served = Served(bundle, tmp_path / "engines", single=True)
    prompt = ["--engines", tmp_path / "engines", "--tokens", ",".join(map(str, golden[0]["prompt_ids"])), "-n", "10"]
    graphed, plain = served.run(program, *prompt), served.run(program, *prompt, "--no-graphs")
    assert graphed.returncode == 0, graphed.stderr
    assert graphed.stdout == plain.stdout
    assert [int(word) for word in graphed.stdout.split()][:4] == golden[0]["greedy_ids"][:4]
    assert "CUDA graphs" not in plain.stderr
    draws = [served.run(program, *prompt, "--temperature", "1.5", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_it_says_what_is_wrong(program: Path, copy_bundle: CopyBundle, tmp_path: Path, standin_libraries: Path) -> None:
    bundle = copy_bundle(dtype="fp32")
    engines = tmp_path / "engines"
    served = Served(bundle, engines, single=True, plugin=True)
    prompt = ["--engines", engines, "--tokens", "1,2"]
    assert (
        served.run(program, *prompt, "--plugin", standin_libraries / "libmamba_plugins.so", "-n", "1").returncode == 0
    )
    for arguments, code, message in (
        (["--tokens", "1"], 2, "--engines is missing"),
        (["--engines", engines], 2, "one of --prompt and --tokens"),
        (["--engines", engines, "--tokens", "1,x"], 2, "not a whole number"),
        (["--engines", engines, "--prompt", "x"], 2, "needs --tokenizer"),
        ([*prompt, "--nonsense", "1"], 2, "not an option"),
        (prompt, 5, "no creator for MambaSelectiveScan"),
        ([*prompt, "--plugin", "nowhere.so"], 5, "does not load the plugin library"),
        (["--engines", tmp_path / "nowhere", "--tokens", "1"], 5, "cannot read"),
    ):
        done = served.run(program, *arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
    Served(bundle, engines, single=True)
    done = served.run(program, "--engines", engines, "--tokens", "4096")
    assert done.returncode == 2 and "not in 0..4095" in done.stderr
    (engines / "model.engine").write_text("something else")
    done = served.run(program, *prompt)
    assert done.returncode == 5 and "the engine is of another version" in done.stderr
