"""What a pipeline of MaxText keeps of a layer with a remat policy, and without any.

    pip install jax==0.10.2 flax chex omegaconf packaging         # Python 3.12
    pip install --no-deps maxtext==0.1.0 aqtp qwix                # or maxtext==0.2.0, and pydantic
    python benchmarks/memory/maxtext_pipeline.py                  # bytes, seconds a case
    python benchmarks/memory/maxtext_pipeline.py v5e:2x2          # and compiled; pip install libtpu
    python benchmarks/memory/maxtext_pipeline.py stacks           # other layers, compiled
    python benchmarks/memory/maxtext_pipeline.py 8bits            # quantised
    python benchmarks/memory/maxtext_pipeline.py sinks            # gpt-oss, for GPUs
    python benchmarks/memory/maxtext_pipeline.py fp32             # in fp32, for GPUs: pip install
        # --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12

in an environment of its own, without a device. MaxText's own decoder is differentiated with one
layer on each of four stages; what the scan over iterations hands from forward to backward is
counted, bytes of one iteration on one stage: ``none`` with set_remat_policy_on_pipeline_iterations
and set_remat_policy_on_layers_per_stage off, other policies as they are by default. ``repeats`` 2
shows what an iteration keeps besides where its weights depend on it: their casts.

With a topology XLA compiles Llama's layer for it, ahead of time (attention is splash there, else
``dot_product``, whose scores are left out of what is printed): temporaries of a device, and the
FLOPs and bytes that the compiler counts, loops' bodies once. ``stacks`` compiles the layers of
:data:`STACKS` with release 0.2.0, narrow ones, some split over two devices: ``stacked`` is what one
iteration puts on one device's stacks in the compiled loop, where copies of a tensor are one.
``fp32`` compiles those of :data:`IN_FP32` for four or eight H100s, ahead of time too, with
attention as ``dot_product``: kernels of GPUs take 16 bits. Loops over repeats are compiled for
processors there, as jaxlib 0.10.2 refuses them for GPUs. ``8bits`` is quantised
(:data:`IN_8_BITS`), on GPUs with ``dot_product`` too. ``sinks`` are gpt-oss's blocks of two layers
(:data:`WITH_SINKS`), to which MaxText refuses the kernels of GPUs. What only reads data or reports
is not imported: empty modules stand for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
from typing import Any
from unittest.mock import MagicMock

STAGES, TOKENS = 4, 521
"""Tokens of a sample: a prime, which tells them and their copies from widths of weights."""
CASES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {},
    "qwen3-8b": {},
    "gemma2-9b": {},
    "gemma3-12b": {},
    "gpt3-175b": {},
    "mixtral-8x7b": {"megablox": False, "sparse_matmul": True},
    "qwen3-30b-a3b": {"megablox": False, "sparse_matmul": True},
    "deepseek2-16b": {"megablox": False, "sparse_matmul": True},
}
NARROW = {
    "base_emb_dim": 1024, "base_mlp_dim": 2816, "base_num_query_heads": 8, "base_num_kv_heads": 2,
}  # fmt: skip
EXPERTS = {**NARROW, "base_moe_mlp_dim": 2816, "megablox": True, "sparse_matmul": True}
LATENT = {
    "base_emb_dim": 1024, "num_experts": 16, "first_num_dense_layers": 3, "megablox": True,
    "base_num_decoder_layers": 7,
}  # fmt: skip
TWO = {"per_device_batch_size": 2}
"""Samples on each device: two devices share those of a microbatch."""
BOTH = ("none", "minimal_with_context")
STACKS: list[tuple[str, tuple[str, ...], int, dict[str, Any]]] = [
    ("llama3.1-8b", BOTH, 1, NARROW),
    ("llama3.1-8b", ("none",), 1, {**NARROW, "ici_tensor_parallelism": 2}),
    ("llama3.1-8b", ("none",), 1, {**NARROW, "ici_context_parallelism": 2}),
    ("llama3.1-8b", ("none",), 2, {**NARROW, **TWO, "ici_fsdp_parallelism": 2}),
    ("qwen3-8b", BOTH, 1, NARROW),
    ("mixtral-8x7b", BOTH, 1, EXPERTS),
    ("mixtral-8x7b", ("none",), 1, {**EXPERTS, **TWO, "ici_expert_parallelism": 2}),
    ("deepseek3-671b", ("none",), 1, LATENT),
    ("gemma3-12b", ("none",), 1, NARROW),
    ("gpt3-6b", ("none",), 1, {}),
    ("llama3.1-8b", ("none",), 1, {**NARROW, "dropout_rate": 0.1}),
    ("gpt3-6b", ("none",), 1, {"dropout_rate": 0.1}),
    ("llama3.1-8b", ("none",), 1, {**NARROW, "ici_tensor_transpose_parallelism": 2}),
    (
        "llama3.1-8b",
        ("none",),
        1,
        {
            **NARROW,
            **TWO,
            "ici_tensor_transpose_parallelism": 2,
            "ici_fsdp_parallelism": 2,
        },
    ),
    (
        "llama3.1-8b",
        ("none",),
        1,
        {
            **NARROW,
            "base_num_kv_heads": 4,
            "ici_tensor_transpose_parallelism": 2,
            "ici_tensor_parallelism": 2,
        },
    ),
    ("mixtral-8x7b", ("none",), 1, {**EXPERTS, "ici_tensor_transpose_parallelism": 2}),
]
"""Models, policies, repeats and options that are compiled; those with ``tensor_transpose`` with
release 0.1.0."""
ROWS = {**EXPERTS, "megablox": False}
IN_FP32: list[tuple[str, int, dict[str, Any]]] = [
    ("llama3.1-8b", 1, NARROW),
    ("llama3.1-8b", 1, {**NARROW, "ici_tensor_parallelism": 2}),
    ("llama3.1-8b", 1, {**NARROW, "ici_context_parallelism": 2}),
    ("llama3.1-8b", 2, NARROW),
    ("qwen3-8b", 1, NARROW),
    ("mixtral-8x7b", 1, ROWS),
    ("mixtral-8x7b", 1, {**ROWS, **TWO, "ici_expert_parallelism": 2}),
    ("deepseek3-671b", 1, {**LATENT, "megablox": False}),
    ("gemma3-12b", 1, NARROW),
    ("gpt3-6b", 1, {}),
    ("gpt3-6b", 1, {"dropout_rate": 0.1}),
]
"""The same without a policy; Megablox is for TPUs, ``ragged_dot`` stands for it."""
WHOLE_HEADS = {
    "base_emb_dim": 1024, "base_mlp_dim": 4096, "base_num_query_heads": 8, "base_num_kv_heads": 8,
    "head_dim": 128,
}  # fmt: skip
IN_8_BITS: list[tuple[str, str, str, int, dict[str, Any]]] = [
    ("llama3.1-8b", "int8", "v5e:2x2", 1, NARROW),
    ("llama3.1-8b", "int8", "v5e:2x2", 2, NARROW),
    ("llama3.1-8b", "int8", "h100:4", 1, NARROW),
    ("gpt3-6b", "int8", "h100:4", 1, WHOLE_HEADS),
    ("mixtral-8x7b", "int8", "h100:4", 1, ROWS),
    ("llama3.1-8b", "fp8", "h100:4", 1, NARROW),
    ("llama3.1-8b", "fp8", "h100:8", 1, {**NARROW, "ici_tensor_parallelism": 2}),
    ("gpt3-6b", "fp8", "h100:4", 1, WHOLE_HEADS),
    ("qwen3-8b", "fp8", "h100:4", 1, NARROW),
    ("llama3.1-8b", "fp8", "v6e:2x2", 2, NARROW),
    ("llama3.1-8b", "nanoo_fp8", "h100:4", 1, NARROW),
    ("gpt3-6b", "nanoo_fp8", "h100:4", 1, WHOLE_HEADS),
]
"""Models, quantizations, topologies, repeats and options, without a policy. AQT splits the range
of gradients of weights over slices, of which there is one. Megablox's product in int8 does not
compile for v5e with jax 0.10.2 (``tpu.reshape``)."""
SINKS = {
    "base_emb_dim": 1024, "base_mlp_dim": 1536, "base_num_query_heads": 8,
    "base_num_kv_heads": 2, "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 2,
    "megablox": False, "sparse_matmul": True,
}  # fmt: skip
OTHER_SINKS = {
    **SINKS, "base_emb_dim": 768, "base_mlp_dim": 1280, "base_num_query_heads": 16,
    "base_num_kv_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip
WITH_SINKS: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt-oss-20b", "h100:4", SINKS),
    ("gpt-oss-20b", "h100:4", OTHER_SINKS),
    ("gpt-oss-20b", "h100:8", {**SINKS, "ici_tensor_parallelism": 2}),
    ("gpt-oss-20b", "h100:8", {**OTHER_SINKS, "ici_tensor_parallelism": 2}),
    ("gpt-oss-20b", "h100:8", {**SINKS, "ici_context_parallelism": 2}),
    ("gpt-oss-20b", "h100:8", {**SINKS, **TWO, "ici_expert_parallelism": 2}),
    ("gpt-oss-20b", "h100:4", {**SINKS, "dtype": "float32"}),
    (
        "gpt-oss-20b", "h100:4",
        {**SINKS, "quantization": "int8", "quantization_local_shard_count": 1},
    ),
    ("gpt-oss-20b", "v5e:2x2", {**SINKS, "megablox": True, "attention": "dot_product"}),
    ("mixtral-8x7b", "h100:8", {**ROWS, "ici_tensor_parallelism": 2}),
    ("gemma2-9b", "h100:4", NARROW),
    ("gemma2-9b", "h100:4", {**NARROW, "dtype": "float32"}),
]  # fmt: skip
"""Models, topologies and options, without a policy; splash attention has no derivative for sinks in
a loop. Besides, a mixture without sinks that is split over tensor, and softcapped scores. moe.py
calls ``jnp.clip`` with names of arguments that jax 0.10.2 has no more."""
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a device that it compiles for."""
AXES = {
    "tensor": "tp", "context": "cp", "expert": "ep", "fsdp": "fsdp",
    "tensor_transpose": "transposed",
}  # fmt: skip
FIXED = {
    "run_name": "count", "enable_checkpointing": False, "base_output_directory": "/tmp",
    "dataset_type": "synthetic", "skip_jax_distributed_system": True, "log_config": False,
    "override_model_config": True, "ici_pipeline_parallelism": STAGES,
    "num_layers_per_pipeline_stage": 1, "num_pipeline_microbatches": STAGES,
    "per_device_batch_size": 1, "max_target_length": TOKENS, "vocab_size": 1024,
}  # fmt: skip


def differentiated(options: dict[str, Any], devices: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """MaxText's mesh, the gradient of a loss over its model, and shapes of what that takes."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    try:  # release 0.2.0
        from maxtext.configs import pyconfig
        from maxtext.layers import quantizations
        from maxtext.models import models
        from maxtext.utils import maxtext_utils
    except ModuleNotFoundError:
        from MaxText import maxtext_utils, pyconfig
        from MaxText.layers import models, quantizations

    root = os.path.dirname(os.path.abspath(pyconfig.__file__))
    base = os.path.join(root.removesuffix("configs"), "configs", "base.yml")
    config = pyconfig.initialize(["", base, *(f"{k}={v}" for k, v in options.items())])
    mesh = Mesh(maxtext_utils.create_device_mesh(config, devices), config.mesh_axes)
    quantised = quantizations.configure_quantization(config)
    model = models.transformer_as_linen(config, mesh, quant=quantised, model_mode="train")
    model = quantizations.maybe_quantize_model(model, config)
    shape = (config.micro_batch_size_to_train_on, config.max_target_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

    def start(key: Any) -> Any:
        ids = jnp.zeros(shape, jnp.int32)
        keys = {"params": key, "dropout": key, "aqt": key}
        return nn.unbox(model.init(keys, ids, ids, ids, enable_dropout=False))

    with mesh, nn.partitioning.axis_rules(config.logical_axis_rules):
        weights = jax.eval_shape(start, jax.random.PRNGKey(0))

    def placed(path: Any, weight: Any) -> Any:
        front = (None,) * (config.num_pipeline_repeats > 1)
        piped = "pipeline_module" in jax.tree_util.keystr(path)
        spec = PartitionSpec(*front, "stage") if piped else PartitionSpec()
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=NamedSharding(mesh, spec))

    drops = config.dropout_rate > 0

    def loss(weights: Any, ids: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        out = model.apply(
            weights, ids, places, jnp.ones_like(ids), enable_dropout=drops,
            rngs={"dropout": jax.random.PRNGKey(0), "params": jax.random.PRNGKey(1)},
            mutable=["intermediates"],
        )  # fmt: skip
        return jnp.sum(jnp.square(out[0].astype(jnp.float32)))

    def run(what: Any) -> Any:
        with mesh, nn.partitioning.axis_rules(config.logical_axis_rules):
            return what()

    weights = jax.tree_util.tree_map_with_path(placed, weights)
    return run, jax.grad(loss), (weights, tokens)


def devices_of(topology: str) -> Any:
    """Devices to compile for: ``v5e:2x2``, ``h100:4``, or this machine's processors."""
    from jax.experimental import topologies

    kind, _, count = topology.partition(":")
    if kind == "h100":
        return topologies.get_topology_desc(
            topology, platform="cuda", target_config=H100, topology=f"1x1x{count}"
        ).devices
    return topologies.get_topology_desc(topology, platform="tpu").devices if count else None


def handed_on(jaxpr: Any, iterations: int) -> list[Any]:
    """What each iteration of the first loop of so many hands to the backward."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == iterations:
            return [v.aval for v in equation.outvars[equation.params["num_carry"] :]]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found = handed_on(inner, iterations) if hasattr(inner, "eqns") else []
                if found:
                    return found
    return []


def clip_as_it_was(clip: Any) -> Any:
    """``jnp.clip`` with ``a_min`` and ``a_max``, as releases 0.1.0 and 0.2.0 call it."""

    def clipped(x: Any, min: Any = None, max: Any = None, **names: Any) -> Any:  # noqa: A002
        return clip(x, names.get("a_min", min), names.get("a_max", max))

    return clipped


def stacked(program: str, iterations: int) -> int:
    """Bytes that one iteration leaves on one device's stacks: of all loops of a compiled
    ``program``, the most that has a place for each iteration."""
    width = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "c64": 8}
    width |= {"f8e4m3fn": 1, "f8e4m3fnuz": 1, "f8e5m2": 1, "s8": 1}
    most = 0
    for loop in re.finditer(r"= \((.*?)\) while\(", program):
        total = 0
        for kind, dims in re.findall(r"(\w+)\[([0-9,]+)\]", loop.group(1)):
            first, *rest = (int(d) for d in dims.split(","))
            if first == iterations and kind in width:
                total += width[kind] * math.prod(rest)
        most = max(most, total)
    return most


def counted(
    name: str, policy: str, repeats: int, topology: str, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One case; ``more`` options of its own."""
    import jax

    options = {**FIXED, "model_name": name, **CASES.get(name, {})}
    options["num_pipeline_repeats"] = repeats
    # DeepSeek's first layers are dense and stay outside.
    options["base_num_decoder_layers"] = STAGES * repeats + name.startswith("deepseek")
    on_tpus = topology.startswith("v")
    options["attention"] = "flash" if on_tpus else "dot_product"
    options["hardware"] = "tpu" if on_tpus else "gpu" if topology.startswith("h") else "cpu"
    options |= more or {}
    options["set_remat_policy_on_pipeline_iterations"] = policy != "none"
    options["remat_policy"] = "full" if policy == "none" else policy
    if topology:
        options["max_target_length"] = 2048 if more is None else 1024
    devices = devices_of(topology)
    with contextlib.redirect_stdout(io.StringIO()):
        run, gradient, shapes = differentiated(options, devices)
        traced = run(lambda: jax.make_jaxpr(gradient)(*shapes))
    length = options["max_target_length"]
    kept = handed_on(traced.jaxpr, STAGES * repeats + STAGES - 1)
    tokens, other = 0, 0
    for each in kept:
        dims, size = each.shape[2:], math.prod(each.shape[2:]) * each.dtype.itemsize
        rows = sum(d % length == 0 for d in dims) if not topology else 1
        tokens += size * (rows == 1)
        other += size * (rows == 0)
    result = {
        "model": name, "policy": policy, "repeats": repeats, "tensors": len(kept),
        "bytes_per_token": tokens / length, "other_bytes": other, "devices": topology,
    }  # fmt: skip
    axes = {axis: f"ici_{name}_parallelism" for name, axis in AXES.items()}
    axes |= {"dtype": "dtype", "dropout": "dropout_rate", "quantization": "quantization"}
    result |= {axis: (more or {})[key] for axis, key in axes.items() if key in (more or {})}
    if topology:
        compiled = run(lambda: jax.jit(gradient).lower(*shapes).compile())
        result["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
        if costs := compiled.cost_analysis():  # no program for GPUs has them
            result |= {"flops": costs["flops"], "bytes_accessed": costs["bytes accessed"]}
        result["stacked"] = stacked(compiled.as_text(), STAGES * repeats + STAGES - 1)
    return result


def main() -> None:
    """Every case, a line each."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    flags = f"--xla_force_host_platform_device_count={STAGES} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = flags
    splash = "tokamax._src.ops.experimental.tpu.splash_attention"
    nested = splash.split(".")
    for name in (
        "grain", "grain.python", "tensorflow", "tensorboardX", "jaxtyping", "google.cloud", "PIL",
        "tiktoken", "tiktoken.load", "maxtext.common.checkpointing", "maxtext.layers.engram",
        "tokamax._src.ops.ragged_dot", f"{splash}.splash_attention_kernel", "transformers",
        *(".".join(nested[: n + 1]) for n in range(len(nested))),
    ):  # fmt: skip
        module = MagicMock()
        module.__path__, module.__spec__ = [], None
        sys.modules[name] = module
    topology = sys.argv[1] if len(sys.argv) > 1 else ""
    if topology == "stacks":
        for name, policies, repeats, more in STACKS:
            split = sum(key.startswith("ici_") for key in more)
            devices = ("v5e:2x2", "v5e:2x4", "v5p:2x2x4")[split]
            for policy in policies:
                print(json.dumps(counted(name, policy, repeats, devices, more)), flush=True)
        return
    if topology == "fp32":
        for name, repeats, more in IN_FP32:
            devices = "h100:8" if any(key.startswith("ici_") for key in more) else "h100:4"
            devices = "cpu" if repeats > 1 else devices
            found = counted(name, "none", repeats, devices, {**more, "dtype": "float32"})
            print(json.dumps(found), flush=True)
        return
    if topology == "8bits":
        for name, quantization, devices, repeats, more in IN_8_BITS:
            chosen = {**more, "quantization": quantization, "quantization_local_shard_count": 1}
            print(json.dumps(counted(name, "none", repeats, devices, chosen)), flush=True)
        return
    if topology == "sinks":
        import jax.numpy as jnp

        jnp.clip = clip_as_it_was(jnp.clip)
        for name, devices, more in WITH_SINKS:
            found = counted(name, "none", 1, devices, more)
            print(json.dumps(found | {"hidden": more["base_emb_dim"]}), flush=True)
        return
    named = "minimal_with_context" if topology else "minimal"
    for name in ["llama3.1-8b"] if topology else CASES:
        cases = [("none", 1), (named, 1), ("full", 1)]
        if not topology:
            cases.append(("none", 2))
        for policy, repeats in cases:
            print(json.dumps(counted(name, policy, repeats, topology)), flush=True)


if __name__ == "__main__":
    main()
