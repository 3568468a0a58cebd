"""What of a layer's forward a compiled program runs again beside a list of named tensors that stay.

Frameworks on XLA name tensors (``jax.ad_checkpoint.checkpoint_name``): queries, keys and values
after their rotation, the projection's output, the outputs of the feed-forward's products. A name
that is kept spares the ops that made it, their collectives included. And what no gradient needs is
not run again at all: a layer's last product, whose output goes into the residual stream only, with
its reduction and the addition. Counted on jax 0.10.2, the backward of a scanned transformer layer
under ``jax.checkpoint`` runs 6 of its 7 products again if nothing is saved, and a name on the
output of the last one adds nothing to what is kept.
"""

from __future__ import annotations

from cost_models.layout import OutputKind
from cost_models.ops import Collective, Elementwise, MatMul, Op

NAMED: dict[OutputKind, frozenset[str]] = {
    "qkv": frozenset({"qkv", "qkv.gather", "qkv_bias", "rope", "q_up", "kv_up"}),
    "out_proj": frozenset({"proj", "proj.scatter", "proj.reduce"}),
    "mlp_in": frozenset(
        {"fc1", "fc1.gather", "shared_fc1", "shared_fc1.gather", "expert_fc1"}
    ),
    "mlp_out": frozenset(
        {
            "fc2", "fc2.scatter", "fc2.reduce", "shared_fc2", "shared_fc2.scatter",
            "shared_fc2.reduce", "expert_fc2",
        }
    ),
}  # fmt: skip
"""Ops that a kept tensor of each name spares, by their names in ``planner.blocks``."""
REDUCED: frozenset[OutputKind] = frozenset({"out_proj", "mlp_out"})
"""Named behind their reduction, so scattered under sequence parallelism."""


def spared_by(op: Op, ops: tuple[Op, ...]) -> OutputKind | None:
    """The name whose tensor, if it is kept, spares running ``op`` of a layer of ``ops`` again.

    Queries and keys are named behind their own norm, whose backward needs what the product made.
    """
    for kind, names in NAMED.items():
        if op.name in names:
            normed = kind == "qkv" and any(other.name == "qk_norm" for other in ops)
            return None if normed and op.name != "rope" else kind
    return None


def unneeded(ops: tuple[Op, ...]) -> frozenset[str]:
    """Names of the ops at the end of a layer whose results no gradient needs."""
    found: set[str] = set()
    for op in reversed(ops):
        if isinstance(op, Elementwise) and not op.name.endswith("_residual"):
            break
        if not isinstance(op, Elementwise | Collective | MatMul):
            break
        if isinstance(op, Collective) and op.group != "tp":
            break
        found.add(op.name)
        if isinstance(op, MatMul):
            break
    return frozenset(found)
