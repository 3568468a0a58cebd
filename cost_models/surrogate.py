"""The surrogate: a bound proved to be at most the simulated time of a completion.

Why the surrogate is a lower bound. Write ``f, b`` for a stage's forward and backward, ``w`` for
``f + b``, ``d`` for the hop, ``m`` for microbatches, ``k = pp - s``. From the first forward of rank
``s``:

1. its work: ``m * w_s`` (all its chunks);
2. nesting: the first forward feeds the next rank and the last backward waits for it, so
   ``Z_s >= f_s0 + b_s0 + 2 d + Z_{s+1}`` with the times of the rank's first chunk;
3. in 1F1B, forward ``i + k`` of rank ``s`` follows backward ``i``: after the first round trip
   through ranks ``s..pp-1``, of ``R = S_s + 2 (k-1) d`` with ``S_s`` the sum of ``w`` from ``s``
   on, another one advances ``k`` microbatches, and one forward and backward on the rank itself
   advances one. With ``a >= 1`` more trips that is ``(1 + a) R + (m - 1 - a k) w_s``: linear in
   ``a``, so largest at ``a = 1`` or ``a = q = (m-1) // k``. With ``q = 0`` only backwards are
   left: ``R + (m-1) b_s``;
4. at ``s = 0`` the remainder ``r`` can make its round trip through the last ``r`` ranks:
   ``(1 + q) (S_0 + 2 (pp-1) d) + S_{pp-r} + 2 (r-1) d``;
5. in GPipe, all forwards then all backwards are two flow shops of equal jobs:
   ``S_s + 2 (k-1) d + (m-1) max w``.

6. where the backward is split, a rank may end with gradients of weights that no other rank waits
   for, and where virtual stages lie on a V, with its second chunk: only its own work (1) counts,
   after the first forwards of the ranks before it.

7. where the ranks share the head, each works on a part of it for every microbatch; what is left of
   it with the last may follow the last backward, so it counts in (1) and not in what other ranks
   wait for. Rounds (3) are longer there.
8. where the first ``n`` microbatches put ``d`` of the last stage's backward off, behind its last
   one (``cost_models.deferral``), its own work before that is ``m w - n d``, ``S`` is short by
   ``d``, and trips of later microbatches have it back: of those ``k`` apart all but ``n / k``.

Each is the length of a path in the graph of the schedule, so it cannot exceed the longest one.
Where cuts carry different amounts, ``d`` is the least transfer of all cuts, and what the chosen
cuts take beyond it (``late_ns``) is added to the paths that cross them: to ``S`` and to both nested
bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.layout import ONE_CHUNK_AT_ONCE
from cost_models.leaf import Leaf, RankCosts, Recompute
from cost_models.step import Field


@dataclass(frozen=True, slots=True)
class Label:
    """Bounds over ranks ``s .. pp - 1``; smaller is better in every field.

    ``nested`` is Z of the module docstring, ``ends`` the bound on finish plus gradients, both from
    the first forward of rank ``s``; ``work`` is S, late transfers included, ``widest`` the largest
    w, ``update`` the largest update, ``tail`` S at rank ``pp - r`` once that rank is passed.
    """

    work: int
    widest: int
    nested: int
    ends: int
    update: int
    tail: int

    def dominates(self, other: Label) -> bool:
        """Whether every field is at most the other's."""
        return (
            self.work <= other.work
            and self.widest <= other.widest
            and self.nested <= other.nested
            and self.ends <= other.ends
            and self.update <= other.update
            and self.tail <= other.tail
        )

    def objective_ns(self, leaf: Leaf) -> int:
        """The surrogate once rank 0 is in."""
        return self.ends + self.update + leaf.sync_ns


EMPTY_LABEL = Label(0, 0, 0, 0, 0, 0)


def extend_label(leaf: Leaf, label: Label, rank: int, costs: RankCosts) -> Label:
    """Prepend ``rank`` to a label that covers the ranks after it."""
    m, hop, k = leaf.microbatches, leaf.hop_ns, leaf.pp - rank
    first, waits, behind = costs.chunks[0], leaf.deferral, 0
    work = label.work + costs.work_ns + first.late_ns
    widest = max(label.widest, costs.work_ns)
    nested = m * costs.work_ns
    if leaf.shared is not None:
        nested -= leaf.shared.times.later
    ends = m * costs.work_ns + costs.gradient_ns
    if k == 1:
        behind = waits.total_ns
        work, nested = work - waits.each_ns, nested - behind
    if rank < leaf.pp - 1:
        round_trip = first.forward_ns + first.backward_ns + 2 * hop + first.late_ns
        if not leaf.splits_backward:
            nested = max(nested, round_trip + label.nested)
        ends = max(ends, first.forward_ns + hop + first.late_on_ns + label.ends)
    loops, rest = divmod(m - 1, k)
    trip = work + 2 * (k - 1) * hop
    tail = label.tail
    if leaf.schedule == "1f1b":
        if loops and k > 1:
            trips = (1 + loops) * trip + waits.in_trips_ns(1 + loops, k, rest)
            two = 2 * trip + waits.in_trips_ns(2, m - 1)
            on_rank = (m - 1 - k) * costs.work_ns
            nested = max(nested, trips + rest * costs.work_ns, two + on_rank)
        elif k > 1:
            nested = max(nested, trip + rest * first.backward_ns)
        if k == (m - 1) % leaf.pp:
            tail = work + 2 * (k - 1) * hop
        if rank == 0:
            again = waits.in_trips_ns(1 + loops, k) + (waits.in_trips_ns(2, m - 1) if tail else 0)
            nested = max(nested, (1 + loops) * trip + again + tail)
    elif leaf.schedule in ONE_CHUNK_AT_ONCE:
        nested = max(nested, trip + (m - 1) * widest)
        tail = 0
    return Label(
        work=work,
        widest=widest if leaf.schedule in ONE_CHUNK_AT_ONCE else 0,
        nested=nested,
        ends=max(ends, nested + behind + costs.gradient_ns),
        update=max(label.update, costs.update_ns),
        tail=tail if leaf.schedule == "1f1b" else 0,
    )


def least_work(leaf: Leaf, options: Sequence[Recompute], cutoff_ns: int) -> list[int]:
    """``result[i]``: least forward, backward and recomputation of the first ``i`` layers.

    With ``n`` layers recomputed at the front of each stage, a stage of at most ``most`` layers
    recomputes at least ``n / max(n, most)`` of them; a longer one is above the cutoff by itself.
    A mixed option repeats in each layer at least what the lesser of its modes does there.
    """
    mode = options[0][0] if len(options) == 1 else "none"
    front, rest = (rows.extra for rows in leaf.parts(mode))
    share = (1, 1)
    if mode == "full":
        cheapest = min(kind[Field.FORWARD] + kind[Field.BACKWARD] for kind in leaf.kinds)
        most = min(len(leaf.sequence), cutoff_ns // max(1, leaf.microbatches * cheapest))
        share = (options[0][1], max(1, options[0][1], most))
    total, result = 0, [0]
    for index in leaf.sequence:
        kind = leaf.kinds[index]
        total += kind[Field.FORWARD] + kind[Field.BACKWARD]
        if mode == "full":
            total += min(k[front] for k in leaf.kinds) * share[0] // share[1]
        else:
            total += min(kind[front], kind[rest])
        result.append(total)
    return result


def least_objective_ns(leaf: Leaf, label: Label, rank: int, work_left: int) -> int:
    """A bound in ns on every completion of a label: the layers left cost at least ``work_left``,
    and what the ranks before ``rank`` send."""
    if rank:
        on, back = leaf.least_sends
        work_left += rank * on + (rank - 1) * back
    total = label.work + work_left
    bound = label.nested + work_left + 2 * rank * leaf.hop_ns
    if rank:
        bound = max(bound, -(-leaf.microbatches * work_left // rank))
    if leaf.schedule == "1f1b":
        loops = (leaf.microbatches - 1) // leaf.pp
        again = leaf.deferral.in_trips_ns(1 + loops, leaf.pp)
        trip = total + 2 * (leaf.pp - 1) * leaf.hop_ns
        bound = max(bound, (1 + loops) * trip + again + label.tail)
    elif leaf.schedule in ONE_CHUNK_AT_ONCE:
        widest = max(label.widest, -(-work_left // rank) if rank else 0)
        trip = total + 2 * (leaf.pp - 1) * leaf.hop_ns
        bound = max(bound, trip + (leaf.microbatches - 1) * widest)
    return max(bound, label.ends) + label.update + leaf.sync_ns


def surrogate_ns(leaf: Leaf, ranks: tuple[RankCosts, ...]) -> int:
    """A lower bound on :func:`simulate_step`; see the module docstring."""
    label = EMPTY_LABEL
    for rank in reversed(range(leaf.pp)):
        label = extend_label(leaf, label, rank, ranks[rank])
    return label.objective_ns(leaf)
