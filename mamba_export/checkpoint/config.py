"""Reading a JSON config strictly: every option is typed, and none goes unread."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from mamba_export.errors import CheckpointError, UsageError
from mamba_export.spec import ModelSpec

_MISSING: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: when the file is not JSON or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "copy or download the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


class Options:
    """A config's options. Each is read once and typed; :meth:`rest` gives those that nobody has read."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where
        self._read: set[str] = set()

    def _get(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.data.get(key, _MISSING)
        if value is _MISSING or (value is None and default is not _MISSING):
            if default is _MISSING:
                raise CheckpointError(f"{self.where} has no '{key}'", "the config is incomplete")
            return default
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: '{key}' is {value!r}, expected {expected}")

    def value(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._get(key, default)

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A whole number; 4.0 counts, 4.5 and true do not."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number."""
        value = as_float(self._get(key, default))
        if value is None:
            self._wrong(key, self.data.get(key), "a number")
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value

    def pair(self, key: str) -> tuple[float, float]:
        """A pair of numbers, by default 0 and infinity."""
        value = self._get(key, (0.0, math.inf))
        if isinstance(value, (list, tuple)) and len(value) == 2:
            low, high = as_float(value[0]), math.inf if value[1] is None else as_float(value[1])
            if low is not None and high is not None:
                return low, high
        self._wrong(key, value, "two numbers, low and high")

    def ignore(self, keys: Iterable[str]) -> None:
        """Mark options that are known to change nothing about the trained model's function."""
        self._read.update(keys)

    def rest(self) -> list[str]:
        """Options that nobody has read."""
        return [key for key in self.data if key not in self._read]


def as_float(value: Any) -> float | None:
    """A number out of JSON, where an infinity may be written in several ways; None for anything else."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = value["__float__"]
    if isinstance(value, str):
        return {"infinity": math.inf, "inf": math.inf, "-infinity": -math.inf, "-inf": -math.inf}.get(value.lower())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def make_spec(where: str, **fields: Any) -> ModelSpec:
    """A :class:`ModelSpec` whose errors name the config they come from."""
    try:
        return ModelSpec(**fields)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}", error.hint or "the config is damaged or of another model") from error


def scaled(where: str, expand: float, d_model: int) -> int:
    """``int(expand * d_model)``, or an error when that is no sensible number."""
    if not 0 < d_model < 1 << 40 or not 0 < expand * d_model < 1 << 40:
        raise CheckpointError(f"{where}: expand = {expand} with a width of {d_model} gives no sensible inner width")
    return int(expand * d_model)
