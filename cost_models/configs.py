"""Price many configurations of a workload on a machine: one call, arrays in, integers out.

A configuration is every degree except what belongs to a leaf (schedule, virtual stages, recompute,
partition). Layers are priced once per distinct shard and once per distinct data-parallel side, then
gathered, so the same formulas serve one layout and a million.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from cost_models import autodiff, deferral, interconnect, transfers
from cost_models.data_parallel import gathered_ahead, price_kind
from cost_models.data_traffic import DataParallel, reduces_each
from cost_models.distinct import (
    Distinct,
    beside_columns,
    distinct_of,
    has_experts,
    shard_from,
    take_shard,
)
from cost_models.fragments import add_lookups
from cost_models.given_order import GivenOrder
from cost_models.graph import Bools, Int64, LayerKind, Shard, WorkloadGraph
from cost_models.host_outputs import Sent, Waiting, refuse_without_room, sent_by
from cost_models.host_room import HostTables, host_tables
from cost_models.idle_passes import bubble_passes
from cost_models.layer_offload import send_layers
from cost_models.layer_times import to_ns
from cost_models.layout import RecomputeMode, RecomputePolicy, Schedule
from cost_models.leaf import Leaf, Row
from cost_models.outside import outside_configs, outside_of
from cost_models.reserve import Reserve
from cost_models.reserve import reserve_bytes as reserve_of
from cost_models.state import local_tensor
from cost_models.step import Field, Machine, price_layer
from cost_models.unique import unique_rows
from cost_models.vocabulary import VocabularyTables, shared_ends, vocabulary_tables


@dataclass(frozen=True)
class Configs:
    """Degrees, one entry per configuration; all arrays have one length."""

    microbatch: Int64
    tp: Int64
    cp: Int64
    cp_kind: Int64
    """Codes of ``cost_models.cp_kinds``."""
    ep: Int64
    etp: Int64
    sequence_parallel: Bools
    dp_replicate: Int64
    dp_shard: Int64
    pp: Int64
    zero_stage: Int64
    reshard: Int64
    """Ranks that keep a copy of the weights for the backward in stage 3; 0: none does."""
    stages: Int64 | None = None
    """Among the replicas, pipeline stages, which split no state; None: there are none."""
    waits: Int64 | None = None
    """Whether gradients wait for the last of several microbatches; None: nowhere."""

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: Int64) -> Configs:
        """Some of them."""
        columns: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        taken: dict[str, Any] = {n: c if c is None else c[index] for n, c in columns.items()}
        return Configs(**taken)

    def shard_columns(self) -> list[Int64]:
        """What the compute of a layer depends on."""
        return [
            self.microbatch, self.tp, self.cp, self.cp_kind, self.ep, self.etp,
            self.sequence_parallel.astype(np.int64),
        ]  # fmt: skip

    def data_columns(self) -> list[Int64]:
        """What the data-parallel side adds."""
        stages = np.ones_like(self.pp) if self.stages is None else self.stages
        waits = np.zeros_like(self.pp) if self.waits is None else self.waits
        return [
            self.dp_replicate, self.dp_shard, self.pp, self.zero_stage, self.reshard, stages, waits
        ]  # fmt: skip

    def microbatches(self, global_batch: int) -> Int64:
        """Microbatches of a step on one rank; at least one."""
        each = self.dp_replicate * self.dp_shard * self.microbatch
        result: Int64 = np.maximum(global_batch // each, 1)
        return result

    @property
    def world(self) -> Int64:
        """Devices of each configuration."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp


@dataclass(frozen=True)
class PricedConfigs:
    """Tables over configurations; ``leaf`` takes one of them out."""

    workload: WorkloadGraph
    machine: Machine
    configs: Configs
    kind_names: tuple[str, ...]
    kinds: tuple[Int64, ...]
    """Per layer kind, shape (fields, configurations)."""
    embedding: Int64
    head: Int64
    hop_ns: Int64
    bucket_ns: Int64
    tied_sync_ns: Int64
    sync_ns: Int64
    reserve: Reserve
    fixed_bytes: Int64
    receive_bytes: Int64
    output_bytes: Int64
    """One receive buffer of a pipeline stage; 0 where the stack keeps none."""
    """The reserve's terms, and what the user keeps free."""
    capacity_bytes: int
    late: tuple[tuple[Int64, Int64], ...] = ()
    """Per cut, what its transfers take beyond ``hop_ns``; empty where all cuts carry the same."""
    blocking: tuple[Schedule, ...] = ()
    """Schedules in which the sending rank waits for its transfers."""
    vocabulary: VocabularyTables | None = None
    """Of a stack whose pipeline ranks share embedding and head."""
    put_off: deferral.PutOff | None = None
    """What the last stage may put off; None: nothing."""
    outside: tuple[Int64, ...] = ()
    """As ``kinds``, of layers that all stages run at once (``cost_models.outside``); 0 without a
    pipeline, empty where the stack has none."""
    ahead: Int64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Layers whose weights are gathered before the one that runs."""
    hosts: HostTables | None = None
    """What the devices send to their hosts; None: nothing."""
    sent: Sent | None = None
    """Outputs that idle passes send there too; None: nothing."""
    casts: tuple[Int64, ...] = ()
    """Of each kind's weights, what a pass keeps where nothing runs again (``autodiff``)."""

    @property
    def policies(self) -> tuple[RecomputeMode, ...]:
        """Names of the recomputation policies that are priced."""
        return tuple(policy.name for policy in self.workload.policies)

    def leaf(
        self, index: int, *, schedule: Schedule, vpp: int, microbatches: int, uneven: bool,
        round_size: int = 0, outside: int = 0, order: GivenOrder | None = None,
    ) -> Leaf:  # fmt: skip
        """The leaf of configuration ``index`` under a schedule, or the user's own ``order``, with
        so many layers ``outside``."""
        position = {name: i for i, name in enumerate(self.kind_names)}
        hop = int(self.hop_ns[index])
        late = tuple((int(on[index]), int(back[index])) for on, back in self.late)
        sends: tuple[tuple[int, int], ...] = ()
        if schedule in self.blocking:
            cuts = late or ((0, 0),) * (len(self.workload.layers) + 1)
            sends = tuple((hop + on, hop + back) for on, back in cuts)
            hop, late = 0, ()
        pp = int(self.configs.pp[index])
        embedding, head, *kinds = (
            _row(table[:, index], schedule) for table in (self.embedding, self.head, *self.kinds)
        )
        shared = None
        if self.vocabulary is not None and pp > 1:
            shared = shared_ends(
                self.vocabulary, index, schedule, pp, microbatches, embedding, head
            )
            embedding, head = (0,) * len(embedding), (0,) * len(head)
        idle = bubble_passes(schedule, pp) if self.machine.stack.idle_passes_stay else 0
        hosts = None if self.hosts is None else self.hosts.of(index, shared_ends=bool(shared))
        if hosts is not None and idle:
            real = microbatches * vpp
            hosts = replace(hosts, passes=(real + idle, real))
        leaf = Leaf(
            schedule=schedule,
            pp=pp,
            vpp=vpp,
            microbatches=microbatches,
            sequence=tuple(position[name] for name in self.workload.layers),
            kinds=tuple(kinds),
            embedding=embedding,
            head=head,
            shared=shared,
            hop_ns=hop,
            bucket_ns=int(self.bucket_ns[index]),
            tied_sync_ns=int(self.tied_sync_ns[index]),
            sync_ns=int(self.sync_ns[index]),
            fixed_bytes=int(self.fixed_bytes[index]),
            receive_bytes=int(self.receive_bytes[index]),
            output_bytes=0 if shared else int(self.output_bytes[index]),
            capacity_bytes=self.capacity_bytes,
            uneven=uneven,
            round_size=round_size,
            order=order,
            late=late,
            sends=sends,
            policies=self.policies,
            ahead=int(self.ahead[index]) if len(self.ahead) else 0,
            deferral=deferral.deferral_of(self.put_off, index, schedule, microbatches),
            idle_forward=self.machine.stack.idle_forward
            and self.workload.head.whole_logits
            and shared is None,
            hosts=hosts,
            idle_passes=idle,
        )
        if outside:
            rows = tuple(tuple(table[:, index].tolist()) for table in self.outside)
            leaf = replace(leaf, outside=outside_of(leaf, rows, outside))
        leaf = autodiff.with_casts(leaf, self.workload, self.casts, index)
        return self.sent.refuse(leaf, index) if self.sent is not None and idle else leaf


def _row(column: Int64, schedule: Schedule) -> Row:
    """A configuration's column under a schedule: in 1F1B most backwards follow a forward and gather
    the weights that it gave back; elsewhere most forwards do, which hide less."""
    row: list[int] = column.tolist()
    if schedule != "1f1b":
        row[Field.BACKWARD] += row[Field.GATHER_LATE]
    return tuple(row)


def shard_of(workload: WorkloadGraph, configs: Configs) -> Shard:
    """The shard of every configuration."""
    columns = [*configs.shard_columns(), *beside_columns(workload, configs), configs.pp]
    return shard_from(workload, columns)


def price_configs(
    workload: WorkloadGraph,
    machine: Machine,
    configs: Configs,
    *,
    reserve_bytes: int = 0,
    capacity_bytes: int | None = None,
) -> PricedConfigs:
    """Price every configuration; ``reserve_bytes`` per device are kept free.

    ``capacity_bytes`` stands in for the device's own memory.
    """
    if workload.global_batch is not None and machine.rules.reduces_last_backward:
        several = configs.microbatches(workload.global_batch) > 1
        waits = several & (configs.zero_stage >= 2) & (configs.pp == 1)
        configs = replace(configs, waits=waits.astype(np.int64))
    full = distinct_of(workload, configs, experts=True)
    alike = full
    if workload.expert_count and np.any(configs.ep * configs.etp > 1):
        alike = distinct_of(workload, configs, experts=False)

    def distinct(kind: LayerKind) -> Distinct:
        return full if has_experts(kind) else alike

    def table(
        kind: LayerKind, policies: tuple[RecomputePolicy, ...] = (), *, tied: bool = False
    ) -> Int64:
        part = distinct(kind)
        times = part.times(lambda shards: price_layer(kind, shards, machine))
        rows, _ = price_kind(
            kind, times, part.expanded, part.data, machine, vocab_divisor=workload.vocab_divisor,
            policies=policies, drop_tied=part.data.pp == 1 if tied else None,
        )  # fmt: skip
        return rows[:, part.pair_of]

    names = tuple(dict.fromkeys(workload.layers))
    shard = shard_of(workload, configs)
    reserve = reserve_of(workload, machine, shard, configs)
    stage_stride = shard.tp * shard.cp * configs.dp_replicate * configs.dp_shard
    capacity = capacity_bytes or int(machine.device.memory_capacity.si)
    vocabulary = vocabulary_tables(workload, machine, shard, configs)
    put_off, most = None, machine.stack.deferred_head_gradients
    if most and vocabulary is None:
        part = distinct(workload.head)
        each = deferral.put_off_ns(workload, machine, part.shards)[part.shard_of]
        each = np.where(configs.pp > 1, each, 0)
        put_off = deferral.PutOff(each, deferral.put_off_bytes(workload, shard), most)
    kinds = tuple(table(workload.kinds[name], workload.policies) for name in names)
    embedding, head = table(workload.embedding), table(workload.head, tied=True)
    stages, of_stages = unique_rows([alike.shard_of, configs.pp])
    at = take_shard(alike.shards, stages[0])
    add_lookups((*kinds, head), embedding, workload, at, stages[1], machine.rules, of_stages)
    send_layers(kinds, names, workload, shard, configs.pp, machine, capacity)
    autodiff.refuse_without_pipeline(kinds, workload, configs.pp, capacity)
    outside: tuple[Int64, ...] = ()
    if workload.global_batch is not None:
        if machine.stack.outside_layers:
            outside = _price_outside(workload, machine, configs, kinds)
        waiting = Waiting(configs.pp, configs.microbatches(workload.global_batch))
        refuse_without_room((*kinds, *outside), workload, shard, waiting, machine, capacity)
    return PricedConfigs(
        workload=workload,
        machine=machine,
        configs=configs,
        kind_names=names,
        kinds=kinds,
        embedding=embedding,
        head=head,
        hop_ns=transfers.hop_ns(workload, machine, shard, configs),
        bucket_ns=_bucket_ns(machine, configs),
        tied_sync_ns=_tied_sync_ns(workload, machine, shard, configs, stage_stride),
        sync_ns=to_ns(
            interconnect.collective_time_s(
                machine.fabric, "all_reduce", np.full(len(configs), 4.0), size=configs.world,
                stride=np.ones_like(configs.tp),
            )
        ),
        reserve=reserve,
        fixed_bytes=reserve.total + reserve_bytes,
        receive_bytes=transfers.receive_bytes(workload, machine, shard, configs),
        output_bytes=_kept_output_bytes(workload, machine, shard, configs),
        capacity_bytes=capacity,
        late=transfers.late_ns(workload, machine, shard, configs),
        blocking=machine.stack.blocking_transfers,
        vocabulary=vocabulary,
        put_off=put_off,
        outside=outside,
        hosts=host_tables(workload, machine, shard, configs),
        ahead=gathered_ahead(configs.dp_shard * configs.cp, machine),
        sent=sent_by(workload, shard, machine),
        casts=autodiff.cast_bytes(workload, shard),
    )  # fmt: skip


def _price_outside(
    workload: WorkloadGraph, machine: Machine, configs: Configs, kinds: Sequence[Int64]
) -> tuple[Int64, ...]:
    """Tables like ``kinds`` of layers that all stages run at once."""
    assert workload.global_batch is not None
    tables = tuple(np.zeros_like(table) for table in kinds)
    index = np.flatnonzero(configs.pp > 1)
    if len(index):
        shares = outside_configs(configs.take(index), workload.global_batch)
        found = price_configs(autodiff.outside(workload), machine, shares).kinds
        for table, rows in zip(tables, found, strict=True):
            table[:, index] = rows
    return tables


def _kept_output_bytes(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs
) -> Int64:
    """Logits of a microbatch, where the last stage of a pipeline keeps them for the step."""
    output = workload.head.output_bytes(shard)
    return np.where(machine.stack.keeps_outputs & (configs.pp > 1), output, 0)


def _bucket_ns(machine: Machine, configs: Configs) -> Int64:
    """Reduction of the last gradient bucket of a step, which nothing hides."""
    size = configs.dp_replicate * configs.dp_shard * configs.cp
    kind = np.where(configs.zero_stage >= 1, 0, 1)
    payload = np.full(len(configs), machine.stack.gradient_bucket_bytes.si)
    times = [
        interconnect.collective_time_s(machine.fabric, name, payload, size=size, stride=configs.tp)
        for name in ("reduce_scatter", "all_reduce")
    ]
    per_step = (size > 1) & ~reduces_each(data_parallel_of(configs), machine.rules)
    return to_ns(np.where(per_step, np.where(kind == 0, times[0], times[1]), 0.0))


def _tied_sync_ns(
    workload: WorkloadGraph, machine: Machine, shard: Shard, configs: Configs, stride: Int64
) -> Int64:
    """All-reduce of the gradient of an embedding table that the first and the last stage hold."""
    if not workload.shares_table:
        return np.zeros(len(configs), dtype=np.int64)
    payload = tied_gradient_bytes(workload, machine, shard)
    two = np.full_like(configs.pp, 2)
    span = stride * (configs.pp - 1)
    time = interconnect.collective_time_s(
        machine.fabric, "all_reduce", payload, size=two, stride=np.maximum(span, 1)
    )
    return to_ns(np.where(configs.pp > 1, time, 0.0))


def tied_gradient_bytes(workload: WorkloadGraph, machine: Machine, shard: Shard) -> Int64:
    """Gradient of an embedding table on one device, which two pipeline stages sum."""
    table = local_tensor(workload.embedding.weights[0], shard, workload.vocab_divisor)
    return table.elements * machine.rules.gradient_bytes


def data_parallel_of(configs: Configs) -> DataParallel:
    """The data-parallel side of every configuration."""
    return DataParallel(*configs.data_columns())
