"""A Polygraphy runner whose one inference is a whole walk through a sequence."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from mamba_export.runtime.base import Runner


class Walk(Protocol):
    """Something that can be run by any :class:`Runner`; see ``compare.Scenario``."""

    @property
    def ids(self) -> NDArray[np.int64]: ...

    def run(self, runner: Runner) -> OrderedDict[str, NDArray[Any]]: ...


class WalkRunner(BaseRunner):  # type: ignore[misc]
    """Runs ``walk`` on ``inner`` as one inference."""

    def __init__(self, name: str, inner: Runner, walk: Walk) -> None:
        super().__init__(name=name)
        self.inner, self.walk = inner, walk

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.int64, self.walk.ids.shape)

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = self.walk.run(self.inner)
        self.inference_time = time.perf_counter() - start
        return outputs


def compare_walks(
    walk: Walk,
    runners: Mapping[str, Runner],
    pairs: Mapping[str, tuple[str, str]],
    judge: Callable[[str, str, NDArray[Any], NDArray[Any]], bool],
) -> None:
    """Run ``walk`` on every runner and compare pairs of them, by Polygraphy's comparator.

    Args:
        walk: what is run.
        runners: name → runner.
        pairs: what a comparison is called → names of the runner and of its reference.
        judge: called with the names of comparison and output, what was found and the reference; says if it passes.
    """
    order = list(runners)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it is the judge who reports
        inner = [WalkRunner(name or "bundle", runner, walk) for name, runner in runners.items()]
        results = Comparator.run(inner, data_loader=[{"input_ids": walk.ids}])
        for title, (found, wanted) in pairs.items():

            def compare(
                found: Mapping[str, Any], wanted: Mapping[str, Any], title: str = title
            ) -> OrderedDict[str, bool]:
                return OrderedDict((name, judge(title, name, found[name], wanted[name])) for name in wanted)

            indices = [(order.index(found), order.index(wanted))]
            Comparator.compare_accuracy(results, comparisons=indices, compare_func=compare)
