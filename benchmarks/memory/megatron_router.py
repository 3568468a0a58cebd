"""What Megatron-Core's router and dispatcher keep of a mixture's tokens for the backward.

    pip install torch --index-url CPU_WHEELS; pip install --no-deps megatron-core==0.16.1 einops
    CUDA_DEVICE_MAX_CONNECTIONS=1 python benchmarks/memory/megatron_router.py CASES.json > OUT.json

in an environment of its own, without a device: tensors are those of the CPU, the process group is
fake. ``CASES.json`` is a list of ``{"tokens", "experts", "top_k", "ep", "groups", "limit",
"score", "dtype", "loss"}``; each comes back with ``kept``, shape and bytes of every storage that
the graph of router and dispatch holds for the backward, and ``stays``, those that the dispatcher's
attributes hold besides, once however many microbatches wait. Rows of the hidden width, and what is
not as long as the tokens are many, are left out. One process per case.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from megatron_cases import run_cases

HIDDEN = 5


class Kept:
    """A tensor that the graph holds for its backward, as long as it does."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Storages that one forward leaves."""
    import torch

    router, dispatcher = build(case)
    saved: list[weakref.ref[Kept]] = []

    def pack(tensor: Any) -> Kept:
        kept = Kept(tensor)
        saved.append(weakref.ref(kept))
        return kept

    hidden = torch.randn(case["tokens"], 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        probabilities, routing_map = router(hidden)
        rows, weights = dispatcher.dispatch_preprocess(hidden, routing_map, probabilities)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
        # The experts' activation keeps the probabilities that it multiplies.
        activation = pack(weights)
        rows = dispatcher.combine_preprocess(rows)
        rows = dispatcher.token_combine(rows)
        rows = dispatcher.combine_postprocess(rows)
    del probabilities, routing_map
    gc.collect()
    # The graph hangs on what was returned, and on the weights that the activation reads.
    assert rows.requires_grad
    assert activation.tensor.requires_grad
    kept: dict[int, list[Any]] = {}
    for tensor in (found.tensor for reference in saved if (found := reference()) is not None):
        told = HIDDEN in tensor.shape or tensor.numel() < case["tokens"]
        name = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        if not told:
            storage = tensor.untyped_storage()
            kept.setdefault(storage.data_ptr(), [name, storage.nbytes()])
    stays = {
        name: value.untyped_storage().nbytes()
        for name, value in vars(dispatcher).items()
        if isinstance(value, torch.Tensor)
        and value.numel() > case["experts"]
        and value.untyped_storage().data_ptr() not in kept
    }
    return {**case, "kept": sorted(kept.values()), "stays": stays}


def build(case: dict[str, Any]) -> Any:
    """Router and dispatcher of a rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ep, local = case["ep"], case["experts"] // case["ep"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep)
    ps.initialize_model_parallel(expert_model_parallel_size=ep, create_gloo_process_groups=False)
    torch.cuda.Stream = lambda *_, **__: None
    torch.cuda.current_device = lambda: "cpu"
    # Transformer Engine's product, where it is installed, is named in one branch only (0.13.1).
    moe_utils.te_general_gemm = None
    # Every rank routes as this one does.
    token_dispatcher.gather_from_sequence_parallel_region = lambda tensor, **_: tensor.repeat(ep)
    grouped = {}
    if case["groups"] > 1:
        grouped = {
            "moe_router_num_groups": case["groups"],
            "moe_router_group_topk": case["limit"],
        }
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        ffn_hidden_size=8,
        num_moe_experts=case["experts"],
        moe_router_topk=case["top_k"],
        expert_model_parallel_size=ep,
        moe_router_score_function=case["score"],
        moe_router_dtype=case["dtype"],
        moe_router_enable_expert_bias=case["score"] == "sigmoid",
        moe_router_load_balancing_type="aux_loss" if case["loss"] else "none",
        moe_aux_loss_coeff=1e-2 if case["loss"] else 0.0,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        **grouped,
    )
    if hasattr(moe_utils, "get_default_pg_collection"):
        collection = {"pg_collection": moe_utils.get_default_pg_collection()}
    else:  # 0.14 and before
        collection = {"model_comm_pgs": moe_utils.get_default_model_comm_pgs()}
    router = TopKRouter(config=config, **collection)
    router.set_layer_number(1)
    router.train()
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher(
        local, list(range(local)), config=config, **collection
    )

    def counted(_: str, counts: Any = None) -> Any:
        # Row counts come from a device to the host here; they are there already.
        for name in ("input_splits", "output_splits"):
            value = getattr(dispatcher, name)
            if isinstance(value, torch.Tensor):
                setattr(dispatcher, name, value.tolist())
        return counts

    dispatcher._maybe_dtoh_and_synchronize = counted
    return router, dispatcher


if __name__ == "__main__":
    sys.exit(run_cases(measure))
