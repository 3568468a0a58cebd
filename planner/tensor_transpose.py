"""A factor of tp that splits feed-forwards' matrices along the other dimension, as a job names it
(``JobSpec.tensor_transpose``; ``planner.blocks.transposed`` has what it sends)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from planner.errors import InputError
from planner.models.spec import (
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
)

if TYPE_CHECKING:
    from planner.request import Request


def transpose_faults(request: Request) -> Iterator[InputError]:
    """Why the stack or the model cannot have the job's factor."""
    ways, stack, model = request.job.tensor_transpose, request.stack, request.model
    if ways == 1:
        return
    label = f"{stack.name} {stack.version}"
    if not stack.tensor_transpose:
        yield InputError(
            f"{label} has no tensor_transpose", hint="--stack maxtext-tpu or --stack maxtext-gpu"
        )
    elif not isinstance(model, ModelSpec) or not all(map(_plain, model.blocks.values())):
        yield InputError(
            f"tensor_transpose is priced for attention and feed-forwards one after the other, and "
            f"{model.name} has other layers",
            hint="leave tensor_transpose out",
        )
    elif model.hidden % ways:
        yield InputError(
            f"the width {model.hidden} does not split over tensor_transpose {ways}",
            hint="a factor of tp that divides the width, such as 2",
        )


def _plain(block: BlockSpec) -> bool:
    mixes = isinstance(block.mixer, AttentionSpec | LatentAttentionSpec)
    feeds = isinstance(block.feed_forward, MlpSpec | MoeSpec)
    return mixes and feeds and not block.parallel
