"""Transfers between pipeline stages: what each rank sends, and how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cost_models import interconnect
from cost_models.graph import Int64, Shard, WorkloadGraph
from cost_models.layer_times import to_ns
from cost_models.step import Machine

if TYPE_CHECKING:
    from cost_models.configs import Configs


def scattered(machine: Machine, shard: Shard) -> Int64:
    """Among how many tensor-parallel ranks a boundary that each of them holds is divided on its
    way: each sends one part, and the receivers gather them."""
    return np.where(machine.stack.scattered_transfers & (shard.sp == 1), shard.tp, 1)


def hop_ns(workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs) -> Int64:
    """Transfer of one microbatch's boundary to the next pipeline stage; of the least one, where
    cuts differ."""
    return _transfer_ns(machine, shard, configs, workload.boundary_bytes_per_token)


def late_ns(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> tuple[tuple[Int64, Int64], ...]:
    """By how much each cut's transfers, on and back, take longer than the least."""
    if not workload.boundaries:
        return ()
    least = hop_ns(workload, machine, shard, configs)
    sizes = {size for cut in workload.boundaries for size in cut}
    late = {size: _transfer_ns(machine, shard, configs, size) - least for size in sizes}
    return tuple((late[on], late[back]) for on, back in workload.boundaries)


def receive_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> Int64:
    """A buffer for one boundary, the largest where cuts differ."""
    if not machine.stack.pipeline_buffers:
        return np.zeros_like(configs.tp)
    sizes = (workload.boundary_bytes_per_token, *(max(cut) for cut in workload.boundaries))
    return np.where(configs.pp > 1, shard.residual_tokens * max(sizes), 0)


def _transfer_ns(machine: Machine, shard: Shard, configs: Configs, bytes_per_token: int) -> Int64:
    stride = configs.tp * configs.cp * configs.dp_replicate * configs.dp_shard
    boundary = shard.residual_tokens * bytes_per_token
    parts = scattered(machine, shard)
    hop = interconnect.send_recv_time_s(
        machine.fabric, boundary / parts, stride=stride, size=configs.pp
    )
    gather = interconnect.collective_time_s(
        machine.fabric, "all_gather", boundary, size=parts, stride=np.ones_like(parts)
    )
    return np.where(configs.pp > 1, to_ns(hop + gather), 0)
