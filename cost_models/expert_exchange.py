"""Time to send tokens to the ranks of their experts, or their outputs back, by dispatcher.

* ``alltoall``: every token is copied ``top_k`` times and sent by an all-to-all of the group.
* ``allgather``: every rank gathers the tokens of the whole group and keeps those it needs; outputs
  come back by a reduce-scatter.
* ``deepep``, ``hybridep`` (the library DeepEP and its NVIDIA branch): a token crosses the network
  once per destination *node* and the node's link once per destination *rank*; both levels are
  pipelined, so the slower one sets the time::

      t = launch + rows max(nodes (k - 1) / k / network, max(ranks (G - 1) / G, floor) / link)

  ``nodes`` and ``ranks`` are the numbers of distinct nodes and ranks that hold an expert of a
  token, expected over routing that is uniform within the rule of the model: ``group_limit`` of the
  ``groups`` of experts (DeepSeek-V3's node-limited routing, arXiv 2412.19437, section 2.1.2). The
  floor is what a kernel takes to read and write each own token, however few copies leave.

Shares of link bandwidth that each library reaches are the links' own (``efficiencies``); how they
compare with measurements is in ``benchmarks/collectives``. Bytes and seconds; arguments broadcast.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cost_models.fabric import Fabric, Floats
from cost_models.interconnect import (
    CollectiveKind,
    collective_time_s,
    oversubscribed,
    place,
    port_slope,
)
from cost_models.ops import Routing
from hardware_profiles.schema import Dispatcher

LAUNCH_S = 33e-6
"""Fixed time of one exchange in a node. Source: ``deepep_normal`` tables of aiconfigurator-core
0.12.0, one token, 8 B200 and 8 H100 (32-45 us)."""
LAUNCH_ACROSS_S = 90e-6
"""The same across nodes. Source: as above, 2 nodes of 8 H100, 512 tokens: 175 us less the wire's
83 us."""
LEAST_COPIES = 2.0
"""Floor of the copies per token that leave a rank: with top-1 routing the kernels take the time of
two. Source: as above, top-1 against top-8 on 8 H100, H200 and B200 (1.9-2.3)."""


def exchange_time_s(
    fabric: Fabric,
    dispatcher: Dispatcher,
    routing: Routing,
    *,
    size: NDArray[np.int64],
    stride: NDArray[np.int64],
    back: bool,
) -> Floats:
    """Seconds to dispatch the tokens of every rank of a group, or (``back``) to combine them."""
    kind, payload = sent(dispatcher, routing, size, back=back)
    if dispatcher == "alltoall" or dispatcher == "allgather":
        return collective_time_s(fabric, kind, payload, size=size, stride=stride)
    return _by_node(fabric, dispatcher, routing, payload, size, stride)


def sent(
    dispatcher: Dispatcher, routing: Routing, size: NDArray[np.int64], *, back: bool
) -> tuple[CollectiveKind, Floats]:
    """What a rank calls to dispatch or (``back``) combine, and the bytes of the whole buffer.

    A library sends each token once per destination: its buffer is the tokens of the rank.
    """
    rows = np.asarray(routing.tokens, np.float64) * routing.row_bytes
    if dispatcher == "alltoall":
        return "all_to_all", rows * routing.top_k
    if dispatcher == "allgather":
        return "reduce_scatter" if back else "all_gather", rows * size
    return "all_to_all", rows


def _by_node(
    fabric: Fabric,
    library: Literal["deepep", "hybridep"],
    routing: Routing,
    rows: Floats,
    size: NDArray[np.int64],
    stride: NDArray[np.int64],
) -> Floats:
    group = place(fabric, size, stride)
    inner = fabric.scale_up.exchange_s_per_byte[library]
    outer = fabric.scale_out.exchange_s_per_byte[library]
    ranks = touched(routing, group.size)
    copies = ranks * (group.members - 1) / np.maximum(group.members, 1)
    busy = np.where(group.members > 1, np.maximum(copies, LEAST_COPIES), 0.0)
    nodes = touched(routing, group.nodes)
    remote = oversubscribed(fabric, group, nodes * (group.nodes - 1) / group.nodes, nodes)
    across = rows * remote * port_slope(fabric, group, outer, to_all=True)
    launch = np.where(group.nodes > 1, LAUNCH_ACROSS_S, LAUNCH_S)
    return np.where(group.size > 1, launch + np.maximum(across, rows * busy * inner), 0.0)


def touched(routing: Routing, cells: Floats) -> Floats:
    """Of ``cells`` equal shares of the experts, how many hold one of a token's, in expectation."""
    distinct, where = np.unique(cells, return_inverse=True)
    values = [_touched(each, routing.experts, routing.top_k, routing.groups, routing.group_limit)
              for each in distinct.tolist()]  # fmt: skip
    return np.array(values)[where].reshape(np.shape(cells))


@lru_cache(maxsize=4096)
def _touched(cells: float, experts: int, top_k: int, groups: int, limit: int) -> float:
    """``limit`` of ``groups`` are chosen, then ``top_k`` of the experts in them."""
    held, per_group = experts / cells, experts / groups
    open_experts = per_group * limit
    inside = groups / cells
    """Groups of which a cell holds experts."""
    if inside <= 1:
        chosen = limit / groups
        return cells * chosen * (1 - _missed(held, open_experts, top_k))
    whole = round(inside)
    ways = math.comb(groups, limit)
    missed = sum(
        math.comb(whole, share) * math.comb(groups - whole, limit - share) / ways
        * _missed(share * per_group, open_experts, top_k)
        for share in range(min(whole, limit) + 1)
    )  # fmt: skip
    return cells * (1 - missed)


def _missed(held: float, experts: float, draws: int) -> float:
    """Probability that none of ``draws`` distinct experts is among the ``held`` ones."""
    return math.prod(max(0.0, 1 - held / (experts - drawn)) for drawn in range(draws))
