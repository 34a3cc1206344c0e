"""A Polygraphy runner whose one inference is a whole walk through a sequence."""

from __future__ import annotations

import time
from collections import OrderedDict
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


def run_both(walk: Walk, runner: Runner, oracle: Runner) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outputs of ``walk`` by runner and by oracle, through Polygraphy's comparator."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        pair = [WalkRunner("bundle", runner, walk), WalkRunner("checkpoint", oracle, walk)]
        results = Comparator.run(pair, data_loader=[{"input_ids": walk.ids}])
    found, wanted = (results[name][0] for name in ("bundle", "checkpoint"))
    return dict(found), dict(wanted)
