"""Seconds of a layer's forward by module and by op, and what running some of it again costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Int64
from cost_models.host import elapsed_s
from cost_models.layout import OutputKind, RecomputePolicy
from cost_models.named_outputs import spared_by, unneeded
from cost_models.ops import Attention, Collective, GroupedMatMul, MatMul, Op, Reals

Real: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """Device and host seconds; ``drains`` where the host waits for the device in between."""

    device: Real
    host: Real
    drains: bool = False

    def __add__(self, other: Work) -> Work:
        return Work(self.device + other.device, self.host + other.host, self.drains or other.drains)

    def __sub__(self, other: Work) -> Work:
        return Work(self.device - other.device, self.host - other.host, self.drains)

    @property
    def elapsed_s(self) -> Real:
        """Seconds that the work takes, the host ahead of the device."""
        return elapsed_s(self.device, self.host)

    @property
    def wait_s(self) -> Real:
        """Of those, the seconds for which the device waits."""
        return self.elapsed_s - self.device

    def share(self, part: Reals) -> Work:
        """Some of the work."""
        return Work(self.device * part, self.host * part, self.drains)

    def take(self, index: Int64) -> Work:
        """The work of some configurations."""
        return Work(self.device[index], self.host[index], self.drains)


class ForwardLog:
    """The work of each op of a forward, summed by what recomputation may tell apart."""

    def __init__(self, ops: tuple[Op, ...]) -> None:
        self.modules: dict[tuple[str, ...], Work] = {}
        self.outputs: dict[OutputKind, Work] = {}
        self.unneeded: dict[OutputKind | None, Work] = {}
        self.products = 0
        self._ops, self._last = ops, unneeded(ops)

    def add(self, op: Op, work: Work) -> None:
        """Count the forward of one op; ops come in the order in which they run."""
        if op.modules:
            self._module(op.modules, work)
        name = spared_by(op, self._ops)
        if op.name in self._last:
            known = self.unneeded.get(name)
            self.unneeded[name] = work if known is None else known + work
        if name is not None:
            self._output(name, work)
        match op:
            case MatMul():
                self._output("matmul", work)
                self._odd(op, work)
            case GroupedMatMul():
                self._output("grouped_matmul", work)
            case Attention():
                self._output("attention", work)
            case Collective(forward_kind="reduce_scatter"):
                self._output("reduce_scatter", work)
            case Collective(forward_kind="all_to_all"):
                self._output("all_to_all", work)

    def _module(self, modules: tuple[str, ...], work: Work) -> None:
        known = self.modules.get(modules)
        self.modules[modules] = work if known is None else known + work

    def _output(self, kind: OutputKind, work: Work) -> None:
        known = self.outputs.get(kind)
        self.outputs[kind] = work if known is None else known + work

    def _odd(self, op: MatMul, work: Work) -> None:
        """Count the products that ``op`` stands for, one by one."""
        odd: Reals = 0
        for part in op.parts:
            self.products += 1
            if self.products % 2:
                odd = odd + np.asarray(part)
        self._output("odd_matmul", work.share(odd / sum(np.asarray(part) for part in op.parts)))


@dataclass(frozen=True)
class Repeats:
    """What running parts of a forward again adds to a layer's backward."""

    whole: Work
    modules: dict[tuple[str, ...], Work]
    outputs: dict[OutputKind, Work]
    back: Work
    """The backward itself."""
    sync_s: float
    """One wait of the host for the device."""
    exchange_hidden: Real | float = 0.0
    """Expert exchange of the forward that hides behind the backward of another microbatch."""
    unneeded: dict[OutputKind | None, Work] = field(default_factory=dict)
    """The end of the layer, which no gradient needs, by the name that else spares it."""

    def seconds(self, policy: RecomputePolicy) -> Real:
        """Device time of what runs again, and what it adds to the wait for the host, or takes off
        it where the device catches up."""
        work = self._work(policy)
        if self.whole.drains and work.drains:
            return work.elapsed_s + self.sync_s
        beside = self.back if self.whole.drains else self.whole + self.back
        return (beside + work).elapsed_s - beside.elapsed_s

    def _work(self, policy: RecomputePolicy) -> Work:
        zero = np.zeros_like(self.whole.device)
        nothing = Work(zero, zero)
        if policy.keeps is None:
            return _sum(
                (w for name, w in self.modules.items() if policy.modules.intersection(name)),
                nothing,
            )
        kept = _sum((w for kind, w in self.outputs.items() if kind in policy.keeps), nothing)
        left = self.whole - kept
        if policy.needed_only:
            left = left - _sum(
                (w for kind, w in self.unneeded.items() if kind not in policy.keeps), nothing
            )
        hidden = 0.0 if "all_to_all" in policy.keeps else self.exchange_hidden
        return Work(
            np.maximum(left.device - hidden, 0.0), np.maximum(left.host, 0.0),
            left.drains and "grouped_matmul" not in policy.keeps,
        )  # fmt: skip

    def take(self, index: Int64) -> Repeats:
        """The same for some configurations."""
        return Repeats(
            self.whole.take(index),
            {name: work.take(index) for name, work in self.modules.items()},
            {kind: work.take(index) for kind, work in self.outputs.items()},
            self.back.take(index),
            self.sync_s,
            np.broadcast_to(self.exchange_hidden, self.whole.device.shape)[index],
            {kind: work.take(index) for kind, work in self.unneeded.items()},
        )


def _sum(works: Iterable[Work], start: Work) -> Work:
    for work in works:
        start = start + work
    return start


Table: TypeAlias = dict[str, dict[str, Real]]


def forward_only(terms: Table, wire: Table) -> tuple[Table, Table, Repeats]:
    """Times of a layer without a backward: nothing flows back, and nothing runs again for it."""
    terms, wire = (
        {name: {**by_phase, "backward": 0.0 * by_phase["backward"]} for name, by_phase in t.items()}
        for t in (terms, wire)
    )
    zero = 0.0 * next(iter(terms.values()))["forward"]
    nothing = Work(zero, zero)
    return terms, wire, Repeats(nothing, {}, {}, nothing, 0.0)
