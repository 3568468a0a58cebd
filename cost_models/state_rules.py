"""Bytes per element of the persistent state, from stack, precision, optimizer and offload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cost_models.graph import Int64
from cost_models.host_loops import loop_of
from cost_models.offload import Offload
from cost_models.optimizers import OPTIMIZERS, OptimizerRule, rule_of
from hardware_profiles.holdings import MuonSpec, OffloadSpec, Precision, StateSpec

StateLayout = Literal["contiguous", "flat", "per_parameter", "dim0"]

ON_DEVICE = Offload()
PLAIN_MUON = MuonSpec()


@dataclass(frozen=True, slots=True)
class StateRules:
    """Bytes per element of the persistent state, from stack, precision and optimizer."""

    weight_bytes: int
    gradient_bytes: int
    """Of the gradients that are reduced."""
    optimizer_bytes: int
    """Of every tensor; some optimizers keep more of some (``optimizer.extra_bytes``)."""
    gather_bytes: int
    """Bytes per element of a gathered (unsharded) weight in ZeRO stages 2 and 3."""
    layout: StateLayout = "flat"
    expert_rows: bool = False
    """Whether ``dim0`` splits experts by their rows however many there are."""
    held_gradient_bytes: int = 0
    """Of the gradients held through the step."""
    whole_gradient_bytes: int = 0
    """Of whole ones in stages 2 and 3, which a pipeline reduces behind its last microbatch."""
    kept_gradient_bytes: int = 0
    """Of whole ones below stage 2."""
    backward_gradient_bytes: int = 0
    """Of what the backward leaves beside them, whole."""
    waiting_gradient_bytes: int = 0
    """Of whole ones that wait for their reduction before they leave the device."""
    step_bytes: int = 0
    """Of flat buffers of the optimizer step, sharded as its state is, and below stage 3 of copies
    for the gradients' norm."""
    norm_bytes: int = 0
    split_bytes_per_1000: int = 0
    """Of 1,000 elements whose optimizer state the host has a share of: the rest, with its
    gradients in fp32."""
    streamed_bytes: int = 0
    """Of what comes from the host for the update, sharded as the state is."""
    streams_extra: bool = False
    """Whether what ``optimizer.extra_bytes`` says comes from the host too."""
    hosts_extra: bool = False
    """Whether it is on the host for good, which updates it."""
    quantised_bytes_per_64: int = 0
    """Of the low-precision copies of 64 elements of a linear layer's weight."""
    gathered_bytes_per_64: int = 0
    """Of 64 elements of a linear layer's weight on their way; 0: as all others."""
    dummy_wgrad: bool = False
    copies_weights: bool = False
    unit_gradients: bool = False
    casts_whole_weights: bool = False
    reduces_each_backward: bool = False
    reduces_last_backward: bool = False
    keeps_after_backward: bool = False
    graph_keeps_gathered: bool = False
    split_over_replicas: bool = False
    bucket_elements: int | None = None
    bucket_elements_per_rank: int = 0
    optimizer: OptimizerRule = OPTIMIZERS["adamw"]
    weights_split_from: int = 3
    """Least ZeRO stage in which weights are split over data parallelism."""
    updated_bytes: int = 4
    """Read and written per parameter beside the state: the master weight, or one that has none."""

    def least_bucket(self, ways: Int64) -> Int64:
        """Least elements of a bucket of the contiguous buffer; as good as all without one."""
        if self.bucket_elements is None:
            return np.full_like(ways, 1 << 62)
        return np.maximum(self.bucket_elements, self.bucket_elements_per_rank * ways)


def _weights_split_from(spec: StateSpec, weight_bytes: int, gather_bytes: int) -> int:
    """Stage 3, or 2 where that is FSDP without resharding; 1 where the stack holds fp32 weights,
    which are split as the state is (MaxText, ``maybe_update_params_sharding_with_opt``)."""
    if weight_bytes > gather_bytes:
        return 1
    return 2 if spec.weights_follow_gradients else 3


def state_rules(
    *, spec: StateSpec, precision: Precision, optimizer: str, master_weights: bool,
    gradient_dtype: str, offload: Offload = ON_DEVICE, host: OffloadSpec | None = None,
    muon: MuonSpec = PLAIN_MUON,
) -> StateRules:  # fmt: skip
    """The rules for one stack and job; see ``cost_models.state``."""
    momentum = muon.momentum_bytes.get(precision, 4)
    if offload.optimizer and host is not None and host.drives is not None:
        momentum = host.drives.momentum_bytes or momentum
    rule = rule_of(optimizer, momentum, experts=muon.experts)
    mixed = precision != "fp32"
    there = loop_of(optimizer, host) if offload.optimizer else None
    if there is not None and there.matrix_passes is None:
        # The host's flat shards have no rows: what else an element keeps is a moment there.
        kept_whole = rule.moment_bytes + rule.flat_bytes
        rule = replace(rule, moment_bytes=kept_whole, extra_bytes=None, flat_bytes=0)
    master = mixed and master_weights
    weight, gathered, state = 2 if master else 4, 2 if mixed else 4, rule.moment_bytes
    state += spec.master_bytes if master else 0
    reduced = 2 if mixed and gradient_dtype == "bf16" else 4
    # A stack that keeps fp32 weights has their gradients in fp32 whatever it reduces.
    held = spec.held_gradient_bytes.get(precision, reduced if master else 4)
    step, norm = spec.step_bytes.get(precision, 0), spec.norm_bytes.get(precision, 0)
    whole = spec.whole_gradient_bytes.get(precision, held if master else reduced)
    kept, streamed, streams_extra = held, 0, False
    left = 0
    waiting, beside = 0, spec.backward_gradient_bytes.get(precision, 0)
    if offload.optimizer and host is not None:
        streamed = host.streamed_bytes(state, weight if offload.parameters else 0)
        streams_extra = host.updates_on == "device" and rule.extra_bytes is not None
        if host.optimizer_bytes is not None:
            each = host.optimizer_bytes - OPTIMIZERS["adamw"].moment_bytes + rule.moment_bytes
            left = each * (1000 - offload.optimizer_per_1000)
        state = step = norm = 0
        # FSDP sends its shards of the reduced sums there: until then a pipeline's are whole here.
        whole, kept = (0, 0) if host.gradients and not host.with_weights else (whole, kept)
        waiting = host.waiting_gradient_bytes
        held, beside = (0, 0) if host.gradients else (held, beside)
    elif offload.parameters and host is not None:
        streamed = host.streamed_bytes(0, weight)
    stays = 0 if offload.parameters else weight
    return StateRules(
        weight_bytes=stays,
        weights_split_from=_weights_split_from(spec, stays, gathered),
        gradient_bytes=reduced,
        optimizer_bytes=state,
        gather_bytes=gathered,
        layout=spec.layout,
        expert_rows=spec.expert_shards == "rows",
        held_gradient_bytes=held,
        whole_gradient_bytes=whole,
        kept_gradient_bytes=kept,
        backward_gradient_bytes=beside,
        waiting_gradient_bytes=waiting,
        step_bytes=step,
        norm_bytes=norm,
        split_bytes_per_1000=left,
        streamed_bytes=streamed,
        streams_extra=streams_extra,
        hosts_extra=there is not None and rule.extra_bytes is not None,
        quantised_bytes_per_64=spec.quantised_bytes_per_64.get(precision, 0),
        gathered_bytes_per_64=spec.gathered_bytes_per_64.get(precision, 0),
        dummy_wgrad=spec.dummy_wgrad,
        copies_weights=spec.copies_weights,
        unit_gradients=spec.unit_gradients or spec.layout == "dim0",
        casts_whole_weights=spec.casts_whole_weights and weight > gathered,
        reduces_each_backward=spec.reduces_each_backward,
        reduces_last_backward=spec.reduces_last_backward,
        keeps_after_backward=spec.keeps_after_backward,
        graph_keeps_gathered=spec.graph_keeps_gathered,
        split_over_replicas=spec.split_over_replicas,
        bucket_elements=spec.bucket_elements,
        bucket_elements_per_rank=spec.bucket_elements_per_rank,
        optimizer=rule,
        updated_bytes=(spec.master_bytes or weight) if master_weights else 4,
    )
