"""From any kind of model to the graph that the cost models price: one lowering per kind."""

from __future__ import annotations

from cost_models.graph import WorkloadGraph
from hardware_profiles.schema import DeviceSpec, StackSpec
from planner.models.kinds import Model
from planner.models.sequence import LayerSequenceSpec
from planner.specs import JobSpec


def lower(model: Model, job: JobSpec, stack: StackSpec, device: DeviceSpec) -> WorkloadGraph:
    """The workload graph of ``model`` under ``job``, for ``stack`` on ``device``."""
    graph = _whole(model, job, stack, device)
    if job.finetune is None:
        return graph
    from planner.finetune import adapt

    return adapt(graph, job.finetune, stack.separate_adapters)


def _whole(model: Model, job: JobSpec, stack: StackSpec, device: DeviceSpec) -> WorkloadGraph:
    if isinstance(model, LayerSequenceSpec):
        from planner import sequence_workload

        return sequence_workload.build_workload(model, job, stack, device)
    from planner import workload

    return workload.build_workload(model, job, stack, device)
