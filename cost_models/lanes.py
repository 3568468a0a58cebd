"""Placement of expert groups that are laid over the ranks lane by lane.

Tensor-parallel ranks are neighbours; their ``lane`` is the place in that group. DeepSpeed orders
the ranks by lane first, deals them out to expert groups in that order, and puts every ep-th into
one group of ranks with the same experts (DeepSpeed, module_inject/auto_ep_folding.py,
``expected_folding_group_tables``). So an expert group takes one lane of as many tensor-parallel
groups as there are, and further lanes of the same where it is larger. Strides here are those of
evenly spaced groups with as many members on each node.
"""

from __future__ import annotations

import numpy as np

from cost_models.graph import Int64


def exchange_stride(tp: Int64, ep: Int64, devices: int) -> Int64:
    """Stride of the ranks that exchange tokens: one of each tensor-parallel group, or several of
    all of them."""
    return np.maximum(np.minimum(tp, devices // ep), 1)


def replica_stride(tp: Int64, ep: Int64, dp: Int64, per_node: int) -> Int64:
    """Stride of the ranks that hold the same experts: all lanes of every ep-th of ``dp``
    tensor-parallel groups, of which a node of ``per_node`` devices holds one at least; where an
    expert group takes several lanes, every so many-th rank of one."""
    whole = np.minimum(ep, np.maximum(per_node // tp, 1))
    result: Int64 = np.where(ep <= dp, whole, np.maximum(ep // dp, 1))
    return result
