"""Embedding and head that share a table in one unit of sharded data parallelism."""

from __future__ import annotations

from dataclasses import replace

from cost_models.graph import LayerKind
from hardware_profiles.schema import StackSpec
from planner.models.spec import ModelSpec
from planner.specs import JobSpec


def tied_unit(
    embedding: LayerKind, head: LayerKind, model: ModelSpec, job: JobSpec, stack: StackSpec
) -> tuple[LayerKind, LayerKind]:
    """Both ends, the head's weights with the embedding's where the stack makes them one unit
    (``LayersSpec.tied_ends``): not where a loss in pieces runs the head by itself, which stays
    priced apart, nor where only a part of the weights is trained."""
    apart = not model.tied_embeddings or stack.layers.tied_ends == "apart"
    if apart or head.in_pieces or model.mtp or job.finetune is not None:
        return embedding, head
    tables = (replace(w, twice=w.sharding == "vocab") for w in embedding.weights)
    own = (weight for weight in head.weights if not weight.copy)
    unit = replace(embedding, weights=(*tables, *own), ends_unit=True)
    return unit, replace(head, weights=())
