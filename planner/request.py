"""A complete request: model, cluster, job and stack, with every default filled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cost_models.given_order import GivenOrder
from cost_models.graph import WorkloadGraph
from cost_models.layout import GIVEN, Schedule
from cost_models.offload import Offload
from cost_models.optimizers import rule_of
from cost_models.recompute import keeps_inputs
from cost_models.step import Machine
from hardware_profiles.provenance import Basis, kernel_basis
from hardware_profiles.schema import ClusterSpec, StackSpec
from hardware_profiles.stack_words import ModelFeature
from planner.blocks.registry import model_kinds
from planner.errors import InputError
from planner.kernels import attention_kernel
from planner.memory_margin import margin_of, usable_bytes
from planner.models.features import PREDICTION, model_features
from planner.models.kinds import Model
from planner.plan import Layout
from planner.schedule_csv import given_order
from planner.specs import JobSpec

DEFAULT_BATCH_TOKENS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """What to plan. ``job`` has ``sequence_length`` and ``global_batch`` set."""

    model: Model
    cluster: ClusterSpec
    job: JobSpec
    stack: StackSpec
    capacity_bytes: int | None = None
    """What-if: device memory in bytes instead of the device's own."""
    remark: str = field(default="", compare=False)
    """Why the stack is not the usual default; empty where it is, or was named."""

    @property
    def sequence(self) -> int:
        """Tokens per sample."""
        assert self.job.sequence_length is not None
        return self.job.sequence_length

    @property
    def global_batch(self) -> int:
        """Samples per step."""
        assert self.job.global_batch is not None
        return self.job.global_batch

    @property
    def tokens_per_step(self) -> float:
        """Tokens that the model learns from in one step: positions less padding."""
        return self.global_batch * self.sequence * (1 - self.job.padding_share)

    @property
    def position(self) -> str:
        """What a position of a sample is called: one that is described as a whole has one."""
        return "sample" if self.model.fixed_sequence == 1 else "token"

    @property
    def devices(self) -> int:
        """Devices of the cluster; a plan uses all of them."""
        return self.cluster.devices

    @cached_property
    def machine(self) -> Machine:
        """What prices depend on besides the layer and the layout."""
        job = self.job
        spec = self.stack.offload
        inputs = frozenset(spec.inputs) if spec is not None else frozenset()
        held = Offload(
            job.optimizer_offload, job.parameter_offload, job.activation_offload, inputs,
            round(1000 * job.optimizer_offload_share) if job.optimizer_offload else 1000,
            self._swapped,
        )  # fmt: skip
        return Machine(self.cluster, self.stack, job.precision, job.optimizer, held)

    @property
    def _swapped(self) -> tuple[int, int]:
        """Elements of the model that are trained, and those that Muon takes, where drives swap
        groups of them with each reduction; else none."""
        spec, stack = self.stack.offload, self.stack
        muon = self.job.optimizer == "muon" and self.job.optimizer_offload
        if not muon or spec is None or spec.drives is None or not spec.drives.momentum_bytes:
            return 0, 0
        takes = rule_of("muon", experts=stack.muon.experts).matrices
        workload = self.workload
        kinds = [workload.embedding, workload.head, *map(workload.kinds.get, workload.layers)]
        weights = [w for kind in kinds if kind for w in kind.weights if not w.copy | w.frozen]
        return sum(w.elements for w in weights), sum(w.elements for w in weights if takes(w))

    @cached_property
    def order(self) -> GivenOrder | None:
        """The user's own order of work, or None."""
        rows = self.job.schedule_actions
        return given_order(rows) if rows else None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Schedules of the space: the stack's, or the user's own alone."""
        return self.stack.schedules if self.order is None else (self.order.schedule,)

    @property
    def runnable_schedules(self) -> tuple[Schedule, ...]:
        """Schedules that a layout may name."""
        return tuple(dict.fromkeys((*self.stack.schedules, *self.schedules)))

    def order_of(self, schedule: Schedule) -> GivenOrder | None:
        """What a layout of ``schedule`` runs, where it is the user's own order."""
        return self.order if schedule in GIVEN else None

    @property
    def layout_constants(self) -> dict[str, Any]:
        """What the stack and the job fix in every layout."""
        return {
            "rank_order": self.stack.rank_order,
            "optimizer_offload": self.job.optimizer_offload,
            "parameter_offload": self.job.parameter_offload,
        }

    @property
    def free_stages(self) -> bool:
        """Whether virtual stages may hold any numbers of layers."""
        return self.job.constraints.virtual_stages == "free"

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """ZeRO stages that the stack has in the job's precision."""
        return self.stack.zero_stages_of.get(self.job.precision, self.stack.zero_stages)

    @property
    def least_zero_stage(self) -> int:
        """ZeRO stage below which several ranks cannot run the job's optimizer, where it asks."""
        stack, job = self.stack, self.job
        muon = stack.muon.least_zero_stage if job.optimizer == "muon" else 0
        there = stack.offload if job.optimizer_offload else None
        host = 0 if there is None else there.least_zero_stage
        both = 0 if there is None or job.optimizer != "muon" else there.muon_zero_stage or 0
        return max(muon, host, both)

    def reshard_options(self, zero_stage: int, ways: int) -> tuple[int, ...]:
        """How many ranks of the ``ways`` that share the weights may keep a copy of them for the
        backward; 0: none does."""
        if zero_stage < 3:
            return (0,)
        if self.stack.reshard_group != "any":
            return (self.machine.reshard_group or 0,)
        return (0, *(n for n in range(2, ways) if ways % n == 0))

    @staticmethod
    def resharding(zero_stage: int, group: int) -> bool | int:
        """What becomes of gathered weights after the forward (``Layout.reshard_after_forward``)."""
        return (group or True) if zero_stage == 3 else False

    def offloading(self, layout: Layout) -> Request:
        """The request with what a layout keeps on the host."""
        asked = {"optimizer_offload": layout.optimizer_offload,
                 "parameter_offload": layout.parameter_offload}  # fmt: skip
        if any(keeps_inputs(part.mode) for stage in layout.stages for part in stage.recompute):
            moved = any(stage.activation_offload_layers for stage in layout.stages)
            asked["activation_offload"] = moved
        if all(getattr(self.job, name) == value for name, value in asked.items()):
            return self
        return replace(self, job=self.job.model_copy(update=asked))

    @cached_property
    def workload(self) -> WorkloadGraph:
        """The model lowered under the job and the stack."""
        from planner.lowering import lower

        return lower(self.model, self.job, self.stack, self.cluster.groups[0].node.device)

    @property
    def unsupported(self) -> str | None:
        """Why the device cannot run this job's precision under this stack, or None."""
        device = self.machine.device
        missing = [name for name in self.machine.product_dtypes if name not in device.peak_flops]
        if missing:
            return (
                f"{device.name} has no {missing[0]} arithmetic "
                f"(it has {', '.join(sorted(device.peak_flops))})"
            )
        kernel = attention_kernel(self.model, self.job, self.stack, device)
        if kernel not in ("unfused", *device.kernels.attention):
            return (
                f"{self.stack.name} runs {kernel} attention, for which {device.name} has no "
                f"efficiency (it has {', '.join(sorted(device.kernels.attention)) or 'none'})"
            )
        return None

    @cached_property
    def foreign_kinds(self) -> tuple[str, ...]:
        """Kinds of layer that the model has and the stack cannot train."""
        return tuple(kind for kind in model_kinds(self.model) if kind not in self.stack.layer_kinds)

    @cached_property
    def lacking(self) -> tuple[ModelFeature, ...]:
        """Features that the model needs and this version of the stack lacks."""
        needed = [name for name in model_features(self.model) if name in self.stack.lacks]
        return tuple(name for name in needed if self.job.mtp or name != PREDICTION)

    @property
    def predicts(self) -> bool:
        """Whether multi-token-prediction modules are trained."""
        return self.job.mtp and PREDICTION in model_features(self.model)

    @property
    def kernel_basis(self) -> Basis:
        """How the efficiencies of the kernels that this job uses are known, the weakest of them."""
        device = self.machine.device
        kernel = attention_kernel(self.model, self.job, self.stack, device)
        return kernel_basis(device, self.machine.product_dtypes, kernel)

    @property
    def device_bytes(self) -> int:
        """Memory of a device in bytes."""
        return self.capacity_bytes or int(self.machine.device.memory_capacity.si)

    @cached_property
    def memory_margin(self) -> tuple[float, str]:
        """Share of the predicted peak that a device must have beyond it, and where it is from."""
        asked = self.job.memory_margin
        return margin_of(self.stack.name) if asked is None else (asked, "as asked")

    @property
    def usable_bytes(self) -> int:
        """Most predicted bytes per device that count as fitting."""
        return usable_bytes(self.device_bytes, self.memory_margin[0])

    @property
    def reserve_bytes(self) -> int:
        """Bytes per device that the user keeps free."""
        return self.job.memory_reserve_bytes or 0


def _sequence(job: JobSpec, model: Model) -> int | None:
    """Tokens per sample that the job asks for, or that the model fixes."""
    fixed = model.fixed_sequence
    if fixed is None or job.sequence_length in (None, fixed):
        return fixed or job.sequence_length
    raise InputError(
        f"sequence length {job.sequence_length}: the samples of {model.name} are of one size",
        hint="leave --seq-len out",
    )


def fill_defaults(job: JobSpec, model: Model, devices: int) -> JobSpec:
    """``job`` with sequence length and global batch in samples set.

    The sequence length defaults to the model's maximum, at most 4096 (8192 where the maximum
    exceeds 8192). The batch defaults to the model's own or to about 4 Mi tokens, rounded to the
    multiple of the device count (or, below that, the power of two) that is nearest.
    """
    sequence = _sequence(job, model)
    if sequence is None:
        longest = model.max_sequence or 4096
        sequence = 8192 if longest > 8192 else min(longest, 4096)
    batch = job.global_batch
    if batch is None:
        tokens = job.global_batch_tokens or DEFAULT_BATCH_TOKENS
        if job.global_batch_tokens is not None and tokens < sequence:
            raise InputError(
                f"a global batch of {tokens} tokens is less than one sample of {sequence} tokens",
                hint=f"--global-batch-tokens {sequence}, or a shorter --seq-len",
            )
        batch = max(1, round(tokens / sequence))
        if model.default_batch is not None and job.global_batch_tokens is None:
            batch = model.default_batch
        if job.global_batch_tokens is None:
            unit = devices if batch >= devices else 1 << max(0, batch.bit_length() - 1)
            batch = max(1, round(batch / unit)) * unit
    return job.model_copy(
        update={
            "sequence_length": sequence,
            "global_batch": batch,
            "global_batch_tokens": batch * sequence,
        }
    )
