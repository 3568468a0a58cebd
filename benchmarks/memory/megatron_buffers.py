"""Param-and-grad buffers that Megatron-Core lays out, for models built on the meta device.

    pip install torch --index-url CPU_WHEELS; pip install --no-deps megatron-core==0.19.2 einops
    CUDA_DEVICE_MAX_CONNECTIONS=1 python benchmarks/memory/megatron_buffers.py CASES.json > OUT.json

in an environment of its own: no device and no other process is needed, the process group is fake.
``CASES.json`` is a list of ``{"world", "rank", "tp", "pp", "cp", "ep", "layers", "hidden", "heads",
"kv", "ffn", "vocab", "experts", "moe_ffn"}``; each comes back with ``dp``, ``edp`` and the elements
of the ``dense`` and ``expert`` buffers, padding included. One process per case.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_cases import dense_config, run_cases


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The buffers of one rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.distributed.distributed_data_parallel_config import (
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=case["world"])
    ps.initialize_model_parallel(
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        context_parallel_size=case.get("cp", 1),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=1 if case.get("experts") else None,
        create_gloo_process_groups=False,
    )
    with torch.device("meta"):
        model = build(case)
    parameters = list(model.bfloat16().parameters())
    dp = ps.get_data_parallel_world_size(with_context_parallel=True)
    edp = ps.get_expert_data_parallel_world_size()
    # As DistributedDataParallel: stages after the first have one bucket.
    first = ps.get_pipeline_model_parallel_rank() == 0
    layout = DistributedOptimizer.compute_full_param_layout(
        parameters,
        max(40_000_000, 1_000_000 * dp) if first else None,
        dp,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        expert_data_parallel_world_size=edp,
    )
    found = {"dense": 0, "expert": 0}
    for key, buffer in layout.layouts.items():
        name = "expert" if key.is_expert_parallel else "dense"
        found[name] += buffer.bucket_indices[-1][1]
    parameters_held = sum(parameter.numel() for parameter in parameters)
    return {**case, "dp": dp, "edp": edp, "parameters": parameters_held, **found}


def build(case: dict[str, Any]) -> Any:
    """The model chunk of one rank, on the current device."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = {}
    if case.get("experts"):
        experts = {
            "num_moe_experts": case["experts"],
            "moe_ffn_hidden_size": case["moe_ffn"],
            "moe_router_topk": 2,
            "expert_model_parallel_size": case.get("ep", 1),
            "expert_tensor_parallel_size": 1,
        }
    config = TransformerConfig(**dense_config(case), **experts)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=case.get("experts"), moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=case["vocab"],
        max_sequence_length=4096,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


if __name__ == "__main__":
    sys.exit(run_cases(measure))
