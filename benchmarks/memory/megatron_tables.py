"""What Megatron-Core's stages hold of an embedding that prediction modules or a tied head share.

    pip install torch --index-url CPU_WHEELS; pip install --no-deps megatron-core==0.16.1 einops
    CUDA_DEVICE_MAX_CONNECTIONS=1 python benchmarks/memory/megatron_tables.py CASES.json > OUT.json

in an environment of its own, without a device: models are built on the meta device, the process
group is fake. ``CASES.json`` is a list of ``{"world", "rank", "tp", "pp", "layers", "hidden",
"heads", "kv", "ffn", "vocab", "mtp", "tied"}``; each comes back with ``dp``, the rank's
``parameters``, the elements of its ``buffer``, padding included, and what its model summed over the
embedding group when it was set up (``shared``: elements, ranks). One process per case.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron_cases import dense_config, run_cases


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The buffer of one rank, and the table that its model shares."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.distributed.distributed_data_parallel_config import (
        DistributedDataParallelConfig,
    )
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=case["world"])
    ps.initialize_model_parallel(
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        create_gloo_process_groups=False,
    )
    shared: list[list[int]] = []

    def all_reduce(tensor: Any, *_: Any, group: Any = None, **__: Any) -> None:
        shared.append([tensor.numel(), dist.get_world_size(group)])

    # The set-up sums the table on a device; the meta device stands for it.
    dist.all_reduce = all_reduce
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.current_device = lambda: "meta"
    with torch.device("meta"):
        model = build(case).bfloat16()
    names = {parameter: name for name, parameter in model.named_parameters()}
    dp = ps.get_data_parallel_world_size(with_context_parallel=True)
    first = ps.get_pipeline_model_parallel_rank() == 0
    buffer = _ParamAndGradBuffer(
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
        ),
        param_dtype=torch.bfloat16,
        grad_dtype=torch.float32,
        params=list(names),
        data_parallel_group=ps.get_data_parallel_group(with_context_parallel=True),
        # As DistributedDataParallel: stages after the first have one bucket.
        bucket_size=max(40_000_000, 1_000_000 * dp) if first else None,
        param_to_name=names,
        gradient_scaling_factor=1.0,
        param_indices=list(range(len(names))),
        nccl_ub=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    held = sum(parameter.numel() for parameter in names)
    return {**case, "dp": dp, "parameters": held, "buffer": buffer.numel, "shared": shared}


def build(case: dict[str, Any]) -> Any:
    """The model chunk of one rank, on the current device."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**dense_config(case), mtp_num_layers=case["mtp"] or None)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    modules = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=case["vocab"],
        max_sequence_length=4096,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=case["tied"],
        position_embedding_type="rope",
        mtp_block_spec=modules if case["mtp"] else None,
    )


if __name__ == "__main__":
    sys.exit(run_cases(measure))
