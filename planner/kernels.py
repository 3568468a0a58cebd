"""Which attention kernel a job's layers run."""

from __future__ import annotations

from hardware_profiles.schema import DeviceSpec, StackSpec
from planner.models.features import model_features
from planner.models.kinds import Model
from planner.specs import JobSpec


def attention_kernel(model: Model, job: JobSpec, stack: StackSpec, device: DeviceSpec) -> str:
    """A fused kernel's generation, or ``unfused``: in fp32, which no kernel takes, and where the
    model has a feature that the stack's kernels refuse."""
    if job.precision == "fp32":
        return "unfused"
    return stack.attention_kernel(device.name, model_features(model))
