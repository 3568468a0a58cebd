"""Seconds of a layer's forward by module and by op, and what running some of it again costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cost_models.graph import Bools, Int64
from cost_models.host import elapsed_s
from cost_models.layout import OutputKind, RecomputePolicy
from cost_models.named_outputs import spared, unneeded
from cost_models.ops import (
    Attention,
    Collective,
    Elementwise,
    GroupedMatMul,
    MatMul,
    Op,
    Reals,
)

Real: TypeAlias = NDArray[np.float64]
Outputs: TypeAlias = frozenset[OutputKind]


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
        self.outputs: dict[Outputs, Work] = {}
        self.unneeded: dict[Outputs, Work] = {}
        self.again: Work | None = None
        self.products = 0
        self._ops, self._last = ops, unneeded(ops)

    def add(self, op: Op, work: Work) -> None:
        """Count the forward of one op; ops come in the order in which they run."""
        if op.modules:
            self._module(op.modules, work)
        if isinstance(op, Elementwise) and op.again:
            self.again = work if self.again is None else self.again + work
        shares = spared(op, self._ops)
        if op.name in self._last:
            names = frozenset(name for part, _ in shares for name in part)
            known = self.unneeded.get(names)
            self.unneeded[names] = work if known is None else known + work
        for names, share in shares:
            self._outputs(names, work.share(share))
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
        self._outputs(frozenset({kind}), work)

    def _outputs(self, kinds: Outputs, work: Work) -> None:
        known = self.outputs.get(kinds)
        self.outputs[kinds] = work if known is None else known + work

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
    outputs: dict[Outputs, Work]
    """By the outputs that together spare it."""
    back: Work
    """The backward itself."""
    sync_s: float
    """One wait of the host for the device."""
    exchange_hidden: Real | float = 0.0
    """Expert exchange of the forward that hides behind the backward of another microbatch."""
    unneeded: dict[Outputs, Work] = field(default_factory=dict)
    """The end of the layer, which no gradient needs, by the names that else spare it."""
    again: Work | None = None
    """What a backward runs once more in layers that do not run again (``Elementwise.again``)."""
    stored: Work | None = None
    """Writing and reading what autodiff keeps beside what kernels write (``cost_models.autodiff``).
    """

    def seconds(self, policies: tuple[RecomputePolicy, ...]) -> Real:
        """Device time of what runs again, and what it adds to the wait for the host, or takes off
        it where the device catches up; shape (policies, configurations)."""
        work, drains = self._work(policies)
        beside = self.back if self.whole.drains else self.whole + self.back
        result = (beside + work).elapsed_s - beside.elapsed_s
        if self.whole.drains and drains.any():
            result = np.where(drains, work.elapsed_s + self.sync_s, result)
        return result

    def _work(self, policies: tuple[RecomputePolicy, ...]) -> tuple[Work, Bools]:
        """What runs again under each policy, and where the host waits in between.

        Summed output by output for all policies at once, never policy by policy in another order:
        a policy costs the same to the last bit whichever others are priced beside it.
        """
        lists = _column([policy.keeps is not None for policy in policies])
        again = Work(lists * self.whole.device, lists * self.whole.host)
        for names, work in self.modules.items():
            runs = [
                bool((p.modules if p.keeps is None else p.tiled).intersection(names))
                for p in policies
            ]
            again = again + work.share(_column(runs))
        for kinds, work in self.outputs.items():
            kept = [p.keeps is not None and kinds <= p.keeps for p in policies]
            again = again - work.share(_column(kept))
        for kinds, work in self.unneeded.items():
            dropped = [
                p.keeps is not None and p.needed_only and not (kinds and kinds <= p.keeps)
                for p in policies
            ]
            again = again - work.share(_column(dropped))
        if self.again is not None:
            again = again - self.again.share(lists)
        if self.stored is not None:
            stays = _column([policy.everything is not None for policy in policies])
            again = again + self.stored.share(stays)
        exposed = [p.keeps is not None and "all_to_all" not in p.keeps for p in policies]
        device = again.device - _column(exposed) * self.exchange_hidden
        drains = [self._drains(policy) for policy in policies]
        return (
            Work(
                np.where(lists > 0, np.maximum(device, 0.0), again.device),
                np.where(lists > 0, np.maximum(again.host, 0.0), again.host),
            ),
            _column(drains) > 0,
        )

    def _drains(self, policy: RecomputePolicy) -> bool:
        """Whether the host waits for the device while a policy's parts run again."""
        if policy.keeps is not None:
            return self.whole.drains and "grouped_matmul" not in policy.keeps
        return any(
            work.drains
            for names, work in self.modules.items()
            if policy.modules.intersection(names)
        )

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
            None if self.again is None else self.again.take(index),
            None if self.stored is None else self.stored.take(index),
        )


def _column(flags: list[bool]) -> Real:
    """0 or 1 for each policy, as a column."""
    return np.array(flags, dtype=np.float64)[:, None]


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
