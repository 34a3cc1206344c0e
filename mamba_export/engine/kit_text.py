"""The texts of a kit: its build script, its run script and its README, for one device and one bundle."""

from __future__ import annotations

from dataclasses import dataclass

from mamba_export.bundle import PREFILL, STEP, Bundle
from mamba_export.devices import Device
from mamba_export.engine.profiles import Profile
from mamba_export.plan import Plan


@dataclass(frozen=True)
class Facts:
    """What the texts speak of.

    Attributes:
        device: the device.
        bundle: the bundle inside the kit.
        single: one engine with two profiles.
        profiles: of prefill and step.
        plan: what the model takes there.
    """

    device: Device
    bundle: Bundle
    single: bool
    profiles: tuple[Profile, Profile]
    plan: Plan


def shape_options(bundle: Bundle, profile: Profile) -> list[str]:
    """trtexec's ``--minShapes``, ``--optShapes`` and ``--maxShapes`` for a profile of the bundle's graphs."""
    inputs: dict[str, list[int]] = {"input_ids": [-1, -1]}
    if bundle.manifest.ragged and profile.name == "prefill":
        inputs["seq_lens"] = [-1]
    inputs |= {state.name: [-1, *state.shape] for state in bundle.states}
    found = []
    for kind, index in (("min", 0), ("opt", 1), ("max", 2)):
        shapes = [f"{name}:{'x'.join(map(str, profile.shapes(dims)[index]))}" for name, dims in inputs.items()]
        found.append(f"--{kind}Shapes={','.join(shapes)}")
    return found


def _builds(facts: Facts) -> list[tuple[str, str, list[str]]]:
    """(engine, graph, options) of every run of trtexec."""
    prefill, step = facts.profiles
    if not facts.single:
        return [
            ("prefill", PREFILL, shape_options(facts.bundle, prefill)),
            ("step", STEP, shape_options(facts.bundle, step)),
        ]
    one = Profile("prefill", step.batch, step.seq)  # the same graph, and so the same inputs, for one token
    options = ["--profile=0", *shape_options(facts.bundle, prefill)]
    return [("model", PREFILL, [*options, "--profile=1", *shape_options(facts.bundle, one)])]


def build_script(facts: Facts) -> str:
    """build.sh."""
    plugins = facts.bundle.target.plugins
    parts = [_HEAD]
    if plugins:
        parts.append(_PLUGIN.replace("@ARCH@", facts.device.sm))
    parts.append(_TRTEXEC)
    for engine, graph, options in _builds(facts):
        lines = " \\\n    ".join([*options, *(["--dynamicPlugins=engines/libmamba_plugins.so"] if plugins else [])])
        parts.append(f"build_engine {engine} {graph} \\\n    {lines}\n")
    return "\n".join([*parts, _PROGRAM])


def generate_script(facts: Facts, has_tokenizer: bool) -> str:
    """generate.sh."""
    fixed = ['--engines "$here/engines"']
    fixed += ['--plugin "$here/engines/libmamba_plugins.so"'] if facts.bundle.target.plugins else []
    fixed += ['--tokenizer "$here/bundle/tokenizer.json"'] if has_tokenizer else []
    eos = facts.bundle.manifest.eos_token_ids
    fixed += [f"--eos {eos[0]}"] if eos else []
    return _GENERATE.replace("@FIXED@", " ".join(fixed))


def readme(facts: Facts) -> str:
    """README.md."""
    spec, plan, manifest = facts.bundle.spec, facts.plan, facts.bundle.manifest
    gigabytes = {
        name: f"{value / 1e9:.2f} GB"
        for name, value in (("total", plan.total), ("available", plan.available), ("weights", plan.weights))
    }
    quantized = (manifest.quantization or {}).get("name")
    values = {
        "TITLE": facts.device.title,
        "MODEL": f"{manifest.checkpoint.get('name', 'a model')} ({spec.family}, {spec.n_layer} layers, "
        f"{quantized or manifest.dtype})",
        "TOTAL": gigabytes["total"],
        "AVAILABLE": gigabytes["available"],
        "WEIGHTS": gigabytes["weights"],
        "FITS": "fits" if plan.fits else "does NOT fit: take a smaller model or a quantized bundle",
        "SPEED": f"{plan.tokens_per_second:,.0f}",
        "ENGINES": "one engine with two profiles, so that the weights are in memory once"
        if facts.single
        else "two engines, for prompts and for single tokens",
        "LONGEST": str(facts.profiles[0].seq.maximum),
        "PROMPT": "--prompt 'Once upon a time'" if facts.bundle.file("tokenizer.json").is_file() else "--tokens 1,2,3",
        "PLUGIN": _README_PLUGIN.replace("@ARCH@", facts.device.sm) if facts.bundle.target.plugins else "",
        "SETUP": _JETPACK if facts.device.jetson else _DESKTOP,
    }
    text = _README
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


_HEAD = """\
#!/usr/bin/env bash
# Builds all of this kit on the device: the plugin library, the engines, and the program that writes text.
# What is there already is kept; remove engines/ and build/ to begin anew. Settings, by environment variables:
#   TENSORRT_ROOT   folder with TensorRT's include/ and lib/, where they are in no usual place
#   TRTEXEC         path of trtexec, where it is neither on PATH nor in /usr/src/tensorrt/bin
#   PLUGIN_LIBRARY  a libmamba_plugins.so for this GPU and TensorRT that was built elsewhere
#   JOBS            compilations at a time (2; each takes up to 2 GB)
#   WORKSPACE       MB of scratch memory a layer may use (TensorRT's own choice)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH="$PATH:/usr/local/cuda/bin:/usr/src/tensorrt/bin"
JOBS="${JOBS:-2}"
mkdir -p engines build

need() {
  command -v "$1" > /dev/null || { echo "error: $1 was not found" >&2; echo >&2; echo "hint: $2" >&2; exit 5; }
}
need cmake "sudo apt-get install cmake g++"
"""

_PLUGIN = """\
# -- the plugin library: the model's own operations, in CUDA
if [ -n "${PLUGIN_LIBRARY:-}" ]; then
  cp "$PLUGIN_LIBRARY" engines/libmamba_plugins.so
elif [ ! -f engines/libmamba_plugins.so ]; then
  need nvcc "sudo apt-get install nvidia-jetpack (or the CUDA toolkit)"
  cmake -S plugins/tensorrt -B build/plugin -DCMAKE_CUDA_ARCHITECTURES=@ARCH@ -DMAMBA_KERNELS_DIR="$PWD/kernels/cuda" \\
      ${TENSORRT_ROOT:+-DTENSORRT_ROOT="$TENSORRT_ROOT"}
  cmake --build build/plugin --parallel "$JOBS"
  cp build/plugin/libmamba_plugins.so build/plugin/libmamba_plugins_static.so engines/
fi
"""

_TRTEXEC = """\
# -- the engines: strongly typed, precision comes from the graphs
TRTEXEC="${TRTEXEC:-trtexec}"
need "$TRTEXEC" "sudo apt-get install libnvinfer-bin, or set TRTEXEC"
help="$("$TRTEXEC" --help 2>&1 || true)"
common=(--timingCacheFile=build/timing.cache)
# Not every version has these: TensorRT 11 is always strongly typed.
for option in --stronglyTyped --skipInference; do
  if [[ "$help" == *"$option"* ]]; then common+=("$option"); fi
done
if [ -n "${WORKSPACE:-}" ]; then common+=("--memPoolSize=workspace:$WORKSPACE"); fi

build_engine() { # name, graph, options
  local name="$1" graph="$2"
  shift 2
  if [ -f "engines/$name.engine" ]; then return; fi
  "$TRTEXEC" --onnx="bundle/$graph" --saveEngine="build/$name.engine" "${common[@]}" "$@"
  mv "build/$name.engine" "engines/$name.engine"
}
"""

_PROGRAM = """\
# -- the program
cmake -S program -B build/program ${TENSORRT_ROOT:+-DTENSORRT_ROOT="$TENSORRT_ROOT"}
cmake --build build/program --parallel "$JOBS"
echo "done; next: ./generate.sh --help"
"""

_GENERATE = """\
#!/usr/bin/env bash
# Writes text: ./generate.sh --prompt TEXT [-n 128] [--temperature 0.8]; build.sh comes first.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "$here/build/program/mamba_generate" @FIXED@ "$@"
"""

_README_PLUGIN = """
The plugin library `engines/libmamba_plugins.so` is built from `plugins/` and `kernels/` for sm_@ARCH@: the model's own
operations as CUDA kernels. To spare the device the compilation, cross-compile it and set `PLUGIN_LIBRARY`.
"""

_JETPACK = """\
JetPack 6 (Orin; TensorRT 10.3, CUDA 12.6) and JetPack 7 (Thor, from 7.2 Orin too; TensorRT 10.13 or later, CUDA 13)
take the same commands. On the Jetson, once:

```bash
sudo apt-get update
sudo apt-get install -y nvidia-jetpack cmake g++
```

`nvidia-jetpack` brings CUDA's compiler, TensorRT with its headers, and `trtexec` in `/usr/src/tensorrt/bin`. Copy this
folder there, then in it:

```bash
./build.sh
```

For the full speed of the board: `sudo nvpmodel -m 0 && sudo jetson_clocks`. If memory is short while building, close
the desktop (`sudo systemctl isolate multi-user.target`) and build with `JOBS=1 WORKSPACE=256 ./build.sh`."""

_DESKTOP = """\
Install the CUDA toolkit, TensorRT 10.3 or later with its headers and `trtexec`, CMake and a C++ compiler. Copy this
folder there, then in it (`TENSORRT_ROOT` is needed only where TensorRT was unpacked from an archive):

```bash
TENSORRT_ROOT=/path/to/TensorRT TRTEXEC=/path/to/TensorRT/bin/trtexec ./build.sh
```"""

_README = """\
# @MODEL@ on @TITLE@

A kit made by mamba-export: all that the device needs to build TensorRT engines and write text. Nothing is downloaded
but NVIDIA's own packages, and no Python is needed.

Memory: about @TOTAL@ of the @AVAILABLE@ that programs have (weights @WEIGHTS@): it @FITS@. Memory bandwidth allows
at most @SPEED@ tokens/s.

## Build

@SETUP@

That makes @ENGINES@. Prompts longer than @LONGEST@ tokens run in pieces.
@PLUGIN@
## Write text

```bash
./generate.sh @PROMPT@ -n 64
./generate.sh @PROMPT@ -n 64 --temperature 0.8 --top-k 40 --seed 1
```

## What is here

| | |
|---|---|
| `bundle/` | graphs, weights, tokenizer, and a manifest with checksums; a bundle of mamba-export |
| `plugins/`, `kernels/` | sources of the plugin library |
| `program/` | sources of the program that loads the engines and writes text |
| `build.sh`, `generate.sh` | the commands above |
| `kit.json` | for which device it was made, and what the model takes there |

`build.sh` keeps what is in `engines/` and `build/`. An engine runs with the version of TensorRT and on the kind of GPU
it was built for: after an update remove `engines/` and build again.
"""
