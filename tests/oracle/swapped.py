"""Groups of parameters that drives swap with each bucket of gradients, of whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.request import Request

if TYPE_CHECKING:
    from tests.oracle.layouts import Layout


def drives_lose_gradients(request: Request, x: Layout) -> bool:
    """Whether a group of matrices is read for a bucket when gradients of it are in memory: of parts
    below 1 MiB or of no whole KiB, in fp32. One bucket meets none."""
    offload, job = request.stack.offload, request.job
    drives = None if offload is None else offload.drives
    if drives is None or "optimizer" not in drives.holds:
        return False
    if not job.optimizer_offload or job.optimizer != "muon":
        return False
    work = request.workload
    kinds = (work.embedding, work.head, *(work.kinds[name] for name in work.layers))
    weights = [w for kind in kinds for w in kind.weights if not w.copy]
    if sum(w.elements for w in weights) <= request.stack.state.reduction_elements:
        return False
    hidden = [w for kind in kinds[2:] for w in kind.weights if w.cols > 1]
    parts = [-(-(w.elements // w.count) // (x.dp_shard * x.cp)) for w in hidden]
    least, whole = drives.part_elements, drives.part_multiple
    return any(part < least or part % whole for part in parts)
