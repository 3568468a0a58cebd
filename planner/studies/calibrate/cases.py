"""Measured runs made ready to be priced again and again under changed profiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.configs import Configs, price_configs
from cost_models.leaf import (
    stage_costs,
)
from cost_models.step_time import simulate_step
from planner.layouts import completion_of, configs_of
from planner.plan import Layout
from planner.predict import with_policies
from planner.request import Request
from planner.studies.calibrate.parameters import Overlay, Parameter, reaches
from planner.studies.policy import Cell
from planner.studies.runs import Run, SkippedError
from planner.studies.validate import Prepared, counted, prepare

SECOND = 1e9


@dataclass(frozen=True, slots=True)
class Case:
    """One run that can be priced and was measured. ``family`` is what is judged together."""

    id: str
    source: str
    family: str
    request: Request
    layout: Layout
    measured_s: float

    def in_family(self, family: str) -> Case:
        """The same run, judged with others."""
        return replace(self, family=family)


def cases_of(
    runs: Iterable[Run], *, group: str | None = None, changes: Mapping[str, Cell] | None = None
) -> list[Case]:
    """The runs that are priced and scored. ``group`` is the column that makes families; the
    default is the families of the conventions table."""
    cases = []
    for run in runs:
        try:
            prepared = prepare(run, changes)
        except SkippedError:
            continue
        measured = counted(run, prepared.request)
        if measured is None:
            continue
        family = run.text(group) if group else prepared.family
        cases.append(_case(run, prepared, family, measured))
    return cases


def _case(run: Run, prepared: Prepared, family: str, measured_s: float) -> Case:
    return Case(
        run.text("id") or str(run.row + 1),
        run.text("source"),
        family,
        prepared.request,
        prepared.layout,
        measured_s,
    )


class RunPricer:
    """Predicted over measured step time, as logarithms, for a fixed list of cases.

    Runs of one request (model, cluster, job, stack) are priced in one call.
    """

    def __init__(self, cases: Sequence[Case], parameters: Sequence[Parameter]) -> None:
        self.cases = tuple(cases)
        self.families = tuple(case.family for case in self.cases)
        self.parameters = tuple(parameters)
        groups: dict[int, list[int]] = {}
        for index, case in enumerate(self.cases):
            groups.setdefault(id(case.request), []).append(index)
        self._groups = tuple(np.array(members) for members in groups.values())
        self._configs = tuple(
            _together([configs_of(self.cases[i].layout) for i in members])
            for members in self._groups
        )
        self._log_measured = np.log([case.measured_s for case in self.cases])

    def moved_by(self, index: int) -> np.ndarray:
        """Which cases can depend on the parameter with this index."""
        parameter = self.parameters[index]
        mask = np.zeros(len(self.cases), dtype=bool)
        for members in self._groups:
            request = self.cases[members[0]].request
            mask[members] = reaches(parameter, request.cluster, request.stack)
        return mask

    def residuals(self, values: Mapping[str, float], only: np.ndarray | None = None) -> np.ndarray:
        """log(predicted / measured) of every case, or NaN where ``only`` is False."""
        overlay = Overlay(self.parameters, values)
        result = np.full(len(self.cases), math.nan)
        for members, configs in zip(self._groups, self._configs, strict=True):
            if only is None or only[members].any():
                times = self._times(members, configs, overlay)
                result[members] = np.log(times) - self._log_measured[members]
        return result if only is None else np.where(only, result, math.nan)

    def _times(self, members: np.ndarray, configs: Configs, overlay: Overlay) -> np.ndarray:
        first = self.cases[members[0]].request
        request = replace(
            first, cluster=overlay.cluster(first.cluster), stack=overlay.stack(first.stack)
        )
        request = request.offloading(self.cases[members[0]].layout)
        layouts = [self.cases[index].layout for index in members]
        completions = [completion_of(layout, request) for layout in layouts]
        modes = tuple(mode for each in completions for mode in each.recompute)
        tables = price_configs(
            with_policies(request, replace(completions[0], recompute=modes)),
            request.machine, configs, reserve_bytes=request.reserve_bytes,
        )  # fmt: skip
        times = np.empty(len(members))
        for place, (layout, completion) in enumerate(zip(layouts, completions, strict=True)):
            leaf = tables.leaf(
                place,
                schedule=layout.schedule,
                vpp=layout.vpp,
                microbatches=layout.num_microbatches,
                uneven=True,
                round_size=layout.round_size,
                order=request.order_of(layout.schedule),
                outside=layout.layers_outside,
            )
            times[place] = simulate_step(leaf, stage_costs(leaf, completion)).total_ns / SECOND
        return times


def _together(parts: Sequence[Configs]) -> Configs:
    columns: dict[str, Any] = {
        name: [getattr(part, name) for part in parts] for name in Configs.__dataclass_fields__
    }
    joined: dict[str, Any] = {
        name: None if each[0] is None else np.concatenate(each) for name, each in columns.items()
    }
    return Configs(**joined)
