"""Recipes: small YAML files that say how each matrix of a model is quantized.

::

    extends: w4a16-g128          # optional: another recipe to start from
    description: one line
    weights:                     # of every linear layer but the head
      type: int4                 # int4, int8, fp8, or float to leave them alone
      group: 128                 # input columns that share a scale: 32, 64, 128 or 256; or channel: one scale a row
      method: gptq               # rtn (round to nearest); calibrated: gptq, yaqa (rows make up for each other)
      scales: mse                # max (largest value), or mse (the scale with the least squared error)
    inputs:                      # of those linear layers; static, from calibration
      type: float                # float, int8 or fp8
      range: mse                 # max, percentile or mse
      percentile: 99.99
    embedding: {type: int8, ...} # the keys of weights; tied: the head's tensor, where the checkpoint ties the two
    head: {type: int8, ...}
    state: fp32                  # of the scan: fp32, fp16 or int8
    smooth: 0.0                  # exponent of the scales between a layer's input and its weight; 0 for none. With
                                 # quantized inputs SmoothQuant's, else the best up to this one for int4 weights
    rotate: {out_proj: 64}       # layers whose input is rotated by Hadamard blocks of that size
    promote: {bits: 0}           # the most sensitive int4 matrices become int8, while the average stays below this
    tune: {steps: 0}             # afterwards: distillation of scales and norms on the calibration data
    layers:                      # overrides: a pattern of layer names → weights, inputs, smooth, rotate
      "*.dt_proj": {weights: {type: int8}}
"""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_export.errors import UsageError

FOLDER = Path(__file__).parent
WEIGHT_TYPES = ("float", "int4", "int8", "fp8")
INPUT_TYPES = ("float", "int8", "fp8")
STATE_TYPES = ("fp32", "fp16", "int8")
GROUPS = (16, 32, 64, 128, 256)
METHODS = ("rtn", "gptq", "yaqa")
SCALES = ("max", "mse")
RANGES = ("max", "percentile", "mse")
LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2")
CHANNEL = 0
"""Value of ``group`` for one scale a row."""
_BLOCK = 128  # columns that share a scale where a product by blocks stands for one by rows: 8.125 bits a value


@dataclass(frozen=True)
class Weights:
    """How a matrix is quantized. ``group`` 0 is one scale a row; ``zeros``: int4 groups have a zero point, which is the
    target's to say."""

    type: str = "float"
    group: int = CHANNEL
    method: str = "rtn"
    scales: str = "max"
    zeros: bool = False


@dataclass(frozen=True)
class Inputs:
    """How the input of a linear layer is quantized: statically, one scale a tensor."""

    type: str = "float"
    range: str = "mse"
    percentile: float = 99.99


@dataclass(frozen=True)
class Tune:
    """Distillation after rounding. ``steps`` 0 turns it off."""

    steps: int = 0
    rate: float = 1e-3
    integers: float = 0.0
    rows: int = 8


@dataclass(frozen=True)
class Promote:
    """Matrices that become int8 after all: the most sensitive, while the average stays below ``bits``; 0: none."""

    bits: float = 0.0


@dataclass(frozen=True)
class Layer:
    """What a recipe says of one linear layer."""

    weights: Weights = Weights()
    inputs: Inputs = Inputs()
    smooth: float = 0.0
    rotate: int = 0


@dataclass(frozen=True)
class Recipe:
    """A validated recipe; see the module's text for the meaning of each part."""

    name: str
    description: str = ""
    weights: Weights = Weights()
    inputs: Inputs = Inputs()
    embedding: Weights = Weights()
    tied: bool = True
    head: Weights = Weights()
    state: str = "fp32"
    smooth: float = 0.0
    rotate: dict[str, int] = field(default_factory=dict)
    promote: Promote = Promote()
    tune: Tune = Tune()
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: bool = False

    def by_blocks(self) -> Recipe:
        """The recipe for a runtime whose weight-only products go by blocks and know zero points: int4 groups get one,
        and int8 rows a scale every few columns."""
        weights = dataclasses.replace(self.weights, zeros=True)
        head, embedding = _finer(self.head), _finer(self.embedding)
        return dataclasses.replace(self, blocks=True, weights=weights, head=head, embedding=embedding)

    def layer(self, name: str) -> Layer:
        """What holds for the linear layer ``backbone.layers.0.mixer.in_proj``; later patterns win."""
        kind = name.rsplit(".", 1)[-1]
        found = Layer(self.weights, self.inputs, self.smooth, self.rotate.get(kind, 0))
        for pattern, changes in self.layers.items():
            if not fnmatch.fnmatchcase(name, pattern):
                continue
            for key, value in changes.items():
                part = dataclasses.replace(getattr(found, key), **value) if isinstance(value, dict) else value
                found = dataclasses.replace(found, **{key: part})
        if kind == "dt_proj":  # its input is a slice of x_proj's output, a few values: it stays float
            found = dataclasses.replace(found, inputs=Inputs(), smooth=0.0, rotate=0)
        return dataclasses.replace(found, weights=self.fit(found.weights, found.inputs))

    def fit(self, weights: Weights, inputs: Inputs) -> Weights:
        """int8 weights as the runtime takes them beside such inputs."""
        return _finer(weights) if self.blocks and inputs.type == "float" else weights

    @property
    def needs_calibration(self) -> str:
        """What in this recipe needs statistics, for people; empty when nothing does."""
        overrides = [self.layer(f"{pattern}.{kind}") for pattern in ("*",) for kind in LAYERS]
        overrides += [self.layer(pattern.replace("*", "backbone.layers.0.mixer")) for pattern in self.layers]
        if any(layer.inputs.type != "float" for layer in overrides):
            return "static scales of the inputs"
        if any(w.method != "rtn" for w in [self.embedding, self.head, *(layer.weights for layer in overrides)]):
            return "GPTQ"
        if self.promote.bits:
            return "the choice of int8 matrices"
        if self.tune.steps:
            return "the tuning after it"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def _finer(weights: Weights) -> Weights:
    fine = weights.type == "int8" and weights.group == CHANNEL
    return dataclasses.replace(weights, group=_BLOCK) if fine else weights


def names() -> list[str]:
    """Names of the recipes that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path | Recipe) -> Recipe:
    """A recipe by name, or from a YAML file of one's own.

    Raises:
        UsageError: there is none, it has keys nobody knows, or values that cannot be.
    """
    if isinstance(name_or_path, Recipe):
        return name_or_path
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
        if not path.is_file() or path.parent != FOLDER:
            raise UsageError(f"no recipe named '{name_or_path}'", f"one of: {', '.join(names())}; or a .yaml file")
    return _build(path.stem, _read(path, []), path)


def _read(path: Path, seen: list[Path]) -> dict[str, Any]:
    """The file with what it extends underneath."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", f"recipes: {', '.join(names())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {str(error).splitlines()[0]}", _HINT) from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a recipe: it must hold keys and values", _HINT)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UsageError(f"{path}: extends must name a recipe or a file, not {base!r}", _HINT)
    below = path.parent / base if base.endswith((".yaml", ".yml")) else FOLDER / f"{base}.yaml"
    if not below.is_file():
        raise UsageError(f"{path}: extends '{base}', which does not exist", f"recipes: {', '.join(names())}")
    if below.resolve() in seen:
        raise UsageError(f"{path}: extends itself through '{base}'", _HINT)
    return _merge(_read(below, [*seen, path.resolve()]), data)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


_HINT = "docs/quantization.md lists the keys of a recipe"


class _Reader:
    """Turns parsed YAML into the dataclasses and names the place of every mistake."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, problem: str, hint: str = _HINT) -> UsageError:
        return UsageError(f"{self.path.name}: {where} {problem}", hint)

    def keys(self, where: str, data: Any, known: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(data, dict):
            raise self.fail(where, f"must hold keys and values, not {data!r}", f"known keys: {', '.join(known)}")
        for key in data:
            if key not in known:
                raise self.fail(where, f"has an unknown key '{key}'", f"known keys: {', '.join(known)}")
        return data

    def choice(self, where: str, value: Any, known: tuple[Any, ...]) -> Any:
        value = {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value
        if value not in known:
            raise self.fail(where, f"can't be {value!r}", f"one of: {', '.join(map(str, known))}")
        return value

    def number(self, where: str, value: Any, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.fail(where, f"can't be {value!r}", f"a number from {low:g} to {high:g}")
        return value

    def weights(self, where: str, data: Any) -> dict[str, Any]:
        data = self.keys(where, data, ("type", "group", "method", "scales"))
        checks = {"type": WEIGHT_TYPES, "method": METHODS, "scales": SCALES, "group": (*GROUPS, "channel")}
        found = {key: self.choice(f"{where}.{key}", value, checks[key]) for key, value in data.items()}
        if "group" in found:
            found["group"] = CHANNEL if found["group"] == "channel" else found["group"]
        if found.get("type") == "fp8" and found.get("group", CHANNEL) != CHANNEL:
            raise self.fail(where, "fp8 weights have one scale a row", "group: channel")
        return found

    def inputs(self, where: str, data: Any) -> dict[str, Any]:
        data = self.keys(where, data, ("type", "range", "percentile"))
        checks = {"type": INPUT_TYPES, "range": RANGES}
        found = {k: self.choice(f"{where}.{k}", v, checks[k]) for k, v in data.items() if k in checks}
        if "percentile" in data:
            found["percentile"] = float(self.number(f"{where}.percentile", data["percentile"], 90.0, 100.0))
        return found

    def rotate(self, where: str, size: Any) -> int:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size & (size - 1) or size > 4096:
            raise self.fail(where, f"can't be {size!r}", "a power of two up to 4096, or 0 for none")
        return size

    def layer(self, where: str, data: Any) -> dict[str, Any]:
        data = self.keys(where, data, ("weights", "inputs", "smooth", "rotate"))
        read: dict[str, Any] = {
            "weights": self.weights,
            "inputs": self.inputs,
            "smooth": lambda w, v: float(self.number(w, v, 0.0, 1.0)),
            "rotate": self.rotate,
        }
        return {key: read[key](f"{where}.{key}", value) for key, value in data.items()}


def _build(name: str, data: dict[str, Any], path: Path) -> Recipe:
    known = tuple(f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "tied", "blocks"))
    reader = _Reader(path)
    reader.keys("the recipe", data, known)
    fields: dict[str, Any] = {"name": name}
    for key, value in data.items():
        if key == "description":
            fields[key] = str(value)
        elif key == "embedding" and value == "tied":
            fields["tied"] = True
        elif key in ("weights", "head", "embedding"):
            fields[key] = Weights(**reader.weights(key, value))
            fields["tied"] = fields.get("tied", True) and key != "embedding"
        elif key == "inputs":
            fields[key] = Inputs(**reader.inputs(key, value))
        elif key == "state":
            fields[key] = reader.choice(key, value, STATE_TYPES)
        elif key == "smooth":
            fields[key] = float(reader.number(key, value, 0.0, 1.0))
        elif key == "rotate":
            reader.keys(key, value, LAYERS)
            fields[key] = {k: reader.rotate(f"{key}.{k}", v) for k, v in value.items()}
        elif key == "promote":
            reader.keys(key, value, ("bits",))
            fields[key] = Promote(float(reader.number("promote.bits", value.get("bits", 0.0), 0.0, 8.0)))
        elif key == "tune":
            reader.keys(key, value, ("steps", "rate", "integers", "rows"))
            steps = int(reader.number("tune.steps", value.get("steps", 0), 0, 100_000))
            rate = float(reader.number("tune.rate", value.get("rate", Tune.rate), 0.0, 1.0))
            integers = float(reader.number("tune.integers", value.get("integers", 0.0), 0.0, 1.0))
            fields[key] = Tune(
                steps, rate, integers, int(reader.number("tune.rows", value.get("rows", Tune.rows), 1, 4096))
            )
        elif key == "layers":
            if not isinstance(value, dict):
                raise reader.fail(key, f"must map patterns to changes, not {value!r}")
            fields[key] = {str(k): reader.layer(f"layers.{k}", v) for k, v in value.items()}
    return _check(Recipe(**fields), reader)


def _check(recipe: Recipe, reader: _Reader) -> Recipe:
    """What single keys can't tell."""
    for kind in LAYERS:
        layer = recipe.layer(f"*.{kind}")
        if layer.inputs.type == "fp8" and layer.weights.type not in ("fp8", "float"):
            raise reader.fail(kind, f"can't multiply fp8 inputs with {layer.weights.type} weights", "weights: fp8")
        if layer.weights.type == "fp8" and layer.weights.method != "rtn":
            raise reader.fail(kind, "fp8 weights are rounded to nearest", "method: rtn")
    if recipe.head.type != "float" and recipe.tied and recipe.embedding not in (Weights(), recipe.head):
        raise reader.fail("embedding", "can't be tied to the head and differ from it", "embedding: tied")
    return recipe
