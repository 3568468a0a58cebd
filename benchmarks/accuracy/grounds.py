"""Other tools on their own ground: the runs they report on, calibrated the way they were.

Calculon was fitted to the machine of the Korthikanti rows, SimuMax has kernels profiled on the B200
of its rows, vTrain replays profiles of its cluster. Here the constants of ``parameters.yaml`` are
fitted to those rows alone. The B200 rows are also predicted without the kernels that SimuMax
measured on that machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hardware_profiles.loader import load_device
from hardware_profiles.schema import ClusterSpec
from planner.studies.calibrate.cases import Case, RunPricer
from planner.studies.calibrate.fit import Problem, fit
from planner.studies.calibrate.parameters import Parameter
from planner.studies.statistics import statistics


@dataclass(frozen=True)
class Ground:
    """A peer's runs and what it reaches there (its own words, in percent)."""

    sources: tuple[str, ...]
    peer: str
    reached: str


GROUNDS = (
    Ground(("korthikanti-2205.05198",), "Calculon", "mean 3.65, worst 8.87"),
    Ground(("simumax-b200",), "SimuMax", "mean 6.5"),
    Ground(("vtrain-single",), "vTrain", "mean 8.4"),
    Ground(("vtrain-multi",), "vTrain", "mean 14.7"),
)
WITHOUT_TRAINING_KERNELS = {"e_backward": 0.75, "memory_bound_efficiency": 0.75}
"""B200 without SimuMax's tables: attention's backward over forward rate, and the streaming share,
both as on H100."""


def own_constants(cases: Sequence[Case], parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Each ground with the errors of constants fitted to its rows alone."""
    rows = []
    for ground in GROUNDS:
        own = [case for case in cases if case.source in ground.sources]
        few = own[:: max(1, len(own) // 150)]
        # The rows are many observations of one machine here, not one family among many.
        fitted = fit(Problem(RunPricer(few, parameters), np.ones(len(few))), rounds=3)
        residuals = RunPricer(own, parameters).residuals(fitted.values(parameters))
        rows.append(
            {
                "sources": list(ground.sources),
                "peer": ground.peer,
                "peer_percent": ground.reached,
                "errors": statistics(np.expm1(residuals).tolist()),
            }
        )
    return rows


def without_own_kernels(
    cases: Sequence[Case], parameters: Sequence[Parameter], values: Mapping[str, float]
) -> dict[str, Any] | None:
    """Errors of the B200 rows under constants fitted without them and without their kernels."""
    own = [
        replace(case, request=replace(case.request, cluster=_blind(case.request.cluster)))
        for case in cases
        if case.source == "simumax-b200"
    ]
    residuals = RunPricer(own, parameters).residuals(values)
    return statistics(np.expm1(residuals).tolist())


def _blind(cluster: ClusterSpec) -> ClusterSpec:
    b200 = load_device("b200-sxm-180gb")
    kernels = b200.kernels
    flash = kernels.attention["cudnn"]["bf16"]
    backward = WITHOUT_TRAINING_KERNELS["e_backward"] * flash.e_forward
    changed = flash.model_copy(update={"e_backward": backward, "half_length_backward": None})
    streaming = kernels.memory_bound_efficiency.model_copy(
        update={"value": WITHOUT_TRAINING_KERNELS["memory_bound_efficiency"]}
    )
    device = b200.model_copy(
        update={
            "kernels": kernels.model_copy(
                update={
                    "attention": {**kernels.attention, "cudnn": {"bf16": changed}},
                    "memory_bound_efficiency": streaming,
                }
            )
        }
    )
    groups = tuple(
        group.model_copy(update={"node": group.node.model_copy(update={"device": device})})
        for group in cluster.groups
    )
    return cluster.model_copy(update={"groups": groups})
