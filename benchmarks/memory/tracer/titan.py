"""torchtitan's model for a planner's model, sharded by torchtitan's own functions."""

import copy
import importlib
from dataclasses import dataclass
from typing import Any

import attention as stand_in
import torch
import torchtitan.distributed.activation_checkpoint as checkpointing
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as distributed_utils
from torchtitan.models.common import token_dispatcher
from torchtitan.tools.utils import set_default_dtype

_SPMD = "partial_dtensor"

_TEMPLATES = {"llama3": ("llama3_8b", "8B"), "qwen3": ("qwen3_14b", "14B"),
              "qwen3_moe": ("qwen3_14b", "30B-A3B"),
              "deepseek_v3": ("deepseek_v3_16b", "16B")}  # fmt: skip
"""Trainer configuration and flavour whose settings (norm, initialisation) are kept."""


@dataclass(frozen=True)
class Built:
    """Stage modules of the traced rank, sharded, and what the step needs to know."""

    parts: list[torch.nn.Module]
    dims: ParallelDims
    trainer: Any
    vocab: int
    hidden: int
    parameters: int
    """In the modules of this rank, before sharding."""


def build(case: dict[str, Any]) -> Built:
    """The rank's part of the model on the ``meta`` device, sharded; call outside fake mode."""
    layout, model = case["layout"], case["model"]
    family = "qwen3" if model["family"] == "qwen3_moe" else model["family"]
    package = importlib.import_module(f"torchtitan.models.{family}")
    registry = importlib.import_module(f"torchtitan.models.{family}.config_registry")
    _use_stand_in(package)
    _balance_experts()
    trainer_name, flavor = _TEMPLATES[model["family"]]
    trainer = getattr(registry, trainer_name)()
    trainer.model_spec = package.model_registry(flavor, attn_backend="flex")
    spec = trainer.model_spec
    config = _sized(spec.model, model, package)
    _apply(trainer, case)
    dims = ParallelDims(
        dp_replicate=layout["dp_replicate"], dp_shard=layout["dp_shard"], cp=layout["cp"],
        tp=layout["tp"], pp=layout["pp"], ep=layout["ep"], world_size=case["world"],
        spmd_backend=_SPMD,
    )  # fmt: skip
    dims.build_mesh()
    distributed_utils.set_spmd_backend(_SPMD)
    config.update_from_config(config=trainer)
    with torch.device("meta"), set_default_dtype(getattr(torch, case.get("dtype", "float32"))):
        whole = config.build()
    parts = [_stage(whole, chunk) for chunk in case["chunks"]]
    count = sum(p.numel() for part in parts for p in part.parameters())
    sharded = [
        spec.parallelize_fn(
            part, parallel_dims=dims, training=trainer.training, parallelism=trainer.parallelism,
            compile_config=trainer.compile, ac_config=trainer.activation_checkpoint,
            dump_folder="",
        )
        for part in parts
    ]  # fmt: skip
    return Built(sharded, dims, trainer, config.vocab_size, config.dim, count)


def _use_stand_in(package: Any) -> None:
    package.get_attention_config = lambda *_args, **_kwargs: stand_in.ShapeOnlyAttention.Config()
    defaults = checkpointing._get_default_save_ops
    if not getattr(defaults, "with_stand_in", False):

        def saved() -> set[Any]:
            return {*defaults(), stand_in.KERNEL}

        saved.with_stand_in = True  # type: ignore[attr-defined]
        checkpointing._get_default_save_ops = saved


def _balance_experts() -> None:
    """Every expert gets the same rows: how many is data, and fake tensors have none."""

    def balanced(
        _self: Any, _local: torch.Tensor, exchanged: torch.Tensor, ep: int
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        rows = _self.rows_sent // ep
        return exchanged.reshape(-1), [rows] * ep, [rows] * ep

    reorder = token_dispatcher.AllToAllTokenDispatcher._local_reorder

    def noting_rows(_self: Any, *args: Any) -> Any:
        result = reorder(_self, *args)
        _self.rows_sent = result[0].shape[0]
        return result

    token_dispatcher.AllToAllTokenDispatcher._local_reorder = noting_rows
    token_dispatcher.AllToAllTokenDispatcher._sync_token_count_exchange = balanced


def _apply(trainer: Any, case: dict[str, Any]) -> None:
    layout, p = case["layout"], trainer.parallelism
    p.data_parallel_replicate_degree = layout["dp_replicate"]
    p.data_parallel_shard_degree = layout["dp_shard"]
    p.tensor_parallel_degree = layout["tp"]
    p.enable_sequence_parallel = layout["sequence_parallel"]
    p.context_parallel_degree = layout["cp"]
    p.pipeline_parallel_degree = layout["pp"]
    p.expert_parallel_degree = layout["ep"]
    p.fsdp_reshard_after_forward = case["reshard"]
    p.spmd_backend = _SPMD
    trainer.training.seq_len = case["sequence"]
    trainer.training.dtype = case.get("dtype", "float32")
    trainer.training.local_batch_size = layout["microbatch_size"]
    trainer.activation_checkpoint = {
        "none": None,
        "selective": checkpointing.SelectiveAC.Config(),
        "full": checkpointing.FullAC.Config(),
    }[case["recompute"]]


def _sized(config: Any, model: dict[str, Any], package: Any) -> Any:
    """``config`` with the dimensions of ``model``."""
    dim, vocab, sizes = model["dim"], model["vocab"], dict(model["layers"])
    rope = copy.deepcopy(config.layers[0].attention.rope)
    rope.dim = sizes.get("qk_rope_head_dim") or sizes["head_dim"]
    rope.max_seq_len = max(rope.max_seq_len, model["max_sequence"])
    sizes |= {"dim": dim, "rope": rope, "attn_backend": "flex"}
    match model["family"]:
        case "llama3":
            sizes.pop("head_dim")
            layers = package._build_llama3_layers(**sizes)
        case "qwen3":
            layers = package._build_qwen3_layers(**sizes)
        case "qwen3_moe":
            layers = package._build_qwen3_moe_layers(**sizes, moe_comm_backend="standard")
        case _:
            layers = package._build_dsv3_layers(
                **sizes, moe_comm_backend="standard", non_blocking_capacity_factor=None, mscale=1.0
            )
    config.dim, config.vocab_size, config.layers = dim, vocab, layers
    config.enable_weight_tying = model["tied"]
    config.tok_embeddings.num_embeddings, config.tok_embeddings.embedding_dim = vocab, dim
    config.lm_head.in_features, config.lm_head.out_features = dim, vocab
    config.norm.normalized_shape = dim
    return config


def _stage(whole: torch.nn.Module, chunk: dict[str, Any]) -> torch.nn.Module:
    """The modules of one virtual stage; the rest is None, which torchtitan's forward skips."""
    first, last = chunk["layers"]
    part = whole if chunk["has_embedding"] and chunk["has_head"] else copy.deepcopy(whole)
    for name in list(part.layers):
        if not first <= int(name) < last:
            del part.layers[name]
    if not chunk["has_embedding"]:
        part.tok_embeddings = None
    if not chunk["has_head"]:
        part.norm = None
        part.lm_head = None
    return part
