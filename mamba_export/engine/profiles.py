"""Optimization profiles: the ranges of batch and sequence an engine is built for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mamba_export.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Smallest, most common and largest size of one dynamic dimension; TensorRT tunes for the middle one."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise UsageError(
                f"{self} is not a profile: it must be 1 ≤ min ≤ opt ≤ max", "three numbers, for example 1,512,2048"
            )

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimum},{self.maximum}"

    @classmethod
    def parse(cls, text: str) -> Range:
        """``"1,512,2048"``, or one number for a fixed size.

        Raises:
            UsageError: when it is neither.
        """
        try:
            numbers = [int(part) for part in text.replace(":", ",").split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            raise UsageError(f"'{text}' is not min,opt,max", "three numbers, for example 1,512,2048")
        return cls(*numbers)

    def to_list(self) -> list[int]:
        """[min, opt, max]."""
        return [self.minimum, self.optimum, self.maximum]


ONE = Range(1, 1, 1)
DEFAULT_BATCH = Range(1, 1, 4)
DEFAULT_SEQ = Range(1, 512, 2048)


@dataclass(frozen=True)
class Profile:
    """One optimization profile of an engine."""

    name: str
    """``prefill`` or ``step``."""
    batch: Range
    seq: Range

    def shapes(self, declared: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Shapes at min, opt and max of an input of the bundle contract: -1 is the batch in front, the sequence behind.

        Args:
            declared: the input's shape in the network, -1 where it is dynamic.
        """
        minimum: list[int] = []
        optimum: list[int] = []
        maximum: list[int] = []
        for axis, dim in enumerate(declared):
            values = [dim] * 3 if dim >= 0 else (self.batch if axis == 0 else self.seq).to_list()
            for shape, value in zip((minimum, optimum, maximum), values, strict=True):
                shape.append(value)
        return minimum, optimum, maximum

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "batch": self.batch.to_list(), "seq": self.seq.to_list()}
