"""Calls that XLA places around layers that MaxText splits over ``tensor`` and ``tensor_transpose``.

    pip install jax==0.10.2 libtpu==0.0.42.1 flax==0.12.8 chex omegaconf packaging
    pip install --no-deps maxtext==0.1.0 aqtp qwix
    python benchmarks/collectives/maxtext_tensor_transpose.py     # about a minute a case

in an environment of its own (Python 3.11 or 3.12), without a device. MaxText's own decoder of two
layers, Llama's of other widths, is differentiated and compiled ahead of time for TPUs; weights,
gradients and tokens are split as its ``logical_axis_rules`` say. Of the optimized program each
collective of 16-bit activations or weights is listed: pass (``again``: recomputed), kind, mesh axes
of its groups, and bytes of the whole buffer (gathered or unreduced; of a permute, what a device
sends). Two of the compiler's options only make that readable: products are not cut into loops of
permutes, and no call is split over the kernels that it runs beside. ``kept``, where the
two axes are alone: bytes of each layer that wait for the backward.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from typing import Any
from unittest.mock import MagicMock

AXES = ("data", "pipeline", "fsdp", "sequence", "context", "tensor", "tensor_transpose", "expert")
"""Mesh axes of the cases, the last one fastest."""
FIXED = {
    "run_name": "count", "enable_checkpointing": False, "base_output_directory": "/tmp",
    "dataset_type": "synthetic", "skip_jax_distributed_system": True, "log_config": False,
    "override_model_config": True, "model_name": "llama3.1-8b", "base_num_decoder_layers": 2,
    "vocab_size": 1024, "hardware": "tpu", "attention": "flash", "remat_policy":
    "minimal_with_context", "allow_split_physical_axes": True,
}  # fmt: skip
SMALL: dict[str, Any] = {"tokens": 1024, "hidden": 2048, "width": 5120, "heads": 16}
LARGE: dict[str, Any] = {"tokens": 2048, "hidden": 4096, "width": 14336, "heads": 32}
CASES: tuple[tuple[dict[str, int], dict[str, int], str], ...] = (
    (SMALL, {"tensor": 4}, "minimal_with_context"),
    (SMALL, {"tensor_transpose": 4}, "minimal_with_context"),
    (SMALL, {"tensor": 2, "tensor_transpose": 2}, "minimal_with_context"),
    (SMALL, {"tensor": 2, "tensor_transpose": 2}, "full"),
    (LARGE, {"tensor": 2, "tensor_transpose": 2}, "minimal_with_context"),
    (SMALL, {"tensor": 4, "tensor_transpose": 2}, "minimal_with_context"),
    (SMALL, {"tensor": 2, "tensor_transpose": 4}, "minimal_with_context"),
)
"""Sizes, degrees, remat policy."""
MANY: dict[str, Any] = {"tokens": 2048, "hidden": 1024, "width": 4096, "heads": 8}
SHORT = {"tokens": 512, "hidden": 3072, "width": 8192, "heads": 24}
MIXTURE = SMALL | {"model": "mixture", "width": 1536}
BESIDE: tuple[tuple[dict[str, Any], int, str], ...] = (
    (SMALL, 1, "t1 u2 f2"), (SMALL, 1, "t2 u2 f2"), (SMALL, 1, "t1 u2 c2"), (SMALL, 4, "t1 u2 f4"),
    (SMALL, 4, "t2 u2 f2"), (SMALL, 1, "t1 u4 f2"), (SMALL, 4, "t1 u2 f2"), (SMALL, 4, "t1 u4 f4"),
    (SMALL, 1, "t1 u2 f4"), (SMALL, 1, "t2 u2 f4"), (SMALL, 1, "t1 u2 f8"), (SMALL, 2, "t4 u2 f2"),
    (SMALL, 4, "t2 u4 f2"), (LARGE, 1, "t2 u2 f4"), (SMALL, 8, "t1 u2 f8"), (SMALL, 16, "t2 u2 f4"),
    (SMALL, 2, "t2 u2 f2"), (SMALL, 2, "t2 u2 p2"), (SMALL, 4, "t1 u2 p2"), (SMALL, 1, "t2 u2 f8"),
    (SMALL, 2, "t1 u2 f4"), (SMALL, 1, "t2 u2 d2"), (SMALL, 1, "t1 u2 f4 full"),
    (SMALL, 1, "t2 u2 f4 full"), (SMALL, 1, "t2 u2 c2"), (SMALL, 4, "t2 u2 f2 p2"),
    (SMALL, 2, "t4 u2 f8"), (SMALL, 1, "t1 u2 f2 d2"), (SMALL, 1, "t2 u2 f2 d2"),
    (SMALL | {"tokens": 2048}, 4, "t1 u4 p2"), (SMALL, 2, "t2 u4 p2"), (SMALL, 2, "t4 u2 p2"),
    (SMALL, 2, "t1 u2 f2 p2"), (LARGE, 1, "t4 u2 f4"), (MANY, 1, "t2 u2 f16"),
    (SHORT, 4, "t1 u8 f4"), (SMALL, 2, "t4 u1 c2"), (SMALL, 2, "t1 u2 f2 c2"),
    (SMALL, 1, "t1 u2 f4 d2"), (SMALL, 1, "t1 u4 c2"), (SMALL, 1, "t2 u2 f4 d2"),
    (SMALL, 4, "t1 u2 f2 d4"), (SMALL | {"tokens": 4096}, 1, "t1 u2 c4"),
    (SMALL, 1, "t1 u4 f2 d2"), (SMALL | {"tokens": 2048}, 1, "t2 u2 c2"),
    (LARGE, 1, "t2 u2 c4"), (SMALL, 1, "t2 u2 f2 d4"), (SMALL, 1, "t2 u4 f2 d2"),
    (SMALL, 1, "t4 u2 f2 d4"), (SMALL | {"tokens": 2048}, 1, "t4 u1 c2"),
    (SMALL | {"tokens": 4096}, 1, "t2 u2 c4"), (SMALL, 1, "t1 u2 c2 d2"),
    (SMALL, 1, "t2 u2 f2 c2"), (SMALL, 1, "t1 u2 f4 c2"),
    (SMALL, 1, "t2 u2 f2 d8"), (SMALL, 1, "t2 u2 f4 d4"), (SMALL, 1, "t4 u2 f2 d2"),
    (SMALL, 1, "t2 u2 f8 d2"), (SMALL, 4, "t2 u2 f2 d4"), (SMALL, 1, "t1 u2 c2 d4"),
    (SMALL | {"tokens": 2048}, 2, "t1 u2 c2 p2"), (SMALL | {"tokens": 2048}, 2, "t2 u2 c2 p2"),
    (SMALL, 1, "t1 u2 f2 c2 d2"), (SMALL, 1, "t2 u2 f2 c2 d2"), (SMALL, 1, "t2 u2 f4 c2"),
    (SMALL, 1, "t1 u4 f2 d4"), (SMALL, 1, "t4 u2 f4 d2"), (SMALL, 1, "t2 u4 f4 d2"),
    (SMALL, 1, "t4 u2 f8 d2"), (SMALL, 1, "t1 u2 f2 d8"), (SMALL, 1, "t1 u4 f2 d8"),
    (SMALL, 2, "t2 u2 f8 d4"), (LARGE, 1, "t2 u2 f4 d2"), (SMALL, 2, "t4 u2 f4 d4"),
    (SMALL | {"model": "latent"}, 1, "t1 u4"), (SMALL | {"model": "latents"}, 1, "t1 u4"),
    (SMALL, 1, "t1 u2 f2"), (SMALL | {"model": "latent"}, 1, "t1 u2 f2"), (MIXTURE, 1, "t1 u4"),
    (MIXTURE, 1, "t1 u2 f2"), (MIXTURE, 1, "t1 u2 d2"), (MIXTURE, 1, "t1 u2 c2"),
    (MIXTURE, 2, "t1 u2 p2"), (SMALL | {"model": "once"}, 4, "t1 u2 f2 p2"),
    (SMALL | {"model": "once"}, 4, "t2 u2 f2 p2"), (SMALL, 1, "t1 u2 s2"), (SMALL, 1, "t2 u2 s2"),
    (SMALL, 1, "t1 u2 s2 c2"), (SMALL, 1, "t4 u2 f2 c2"), (SMALL, 1, "t2 u4 f2 d4"),
    (MANY, 1, "t2 u2 f4 c4"), (SMALL, 2, "t4 u2 f2 d8"), (MIXTURE, 1, "t1 u2 f4"),
    (MIXTURE, 1, "t1 u4 f2"), (LARGE | {"model": "mixture", "width": 2048}, 1, "t1 u2 f2"),
    (MIXTURE, 2, "t1 u2 f2 d2"), (MIXTURE, 2, "t1 u2 f2 full"),
)  # fmt: skip
"""Sizes; samples of a rank, under a pipeline microbatches of one; degrees by their axes' letters
(``LETTERS``), and a policy where it is not minimal_with_context."""
MODELS: dict[str, dict[str, Any]] = {
    "mixture": {"model_name": "mixtral-8x7b", "num_experts": 4},
    "latent": {
        "model_name": "deepseek2-16b", "first_num_dense_layers": 2, "base_num_kv_heads": 16,
    },
    "latents": {
        "model_name": "deepseek3-671b", "first_num_dense_layers": 2, "base_num_kv_heads": 16,
        "q_lora_rank": 768,
    },
    "once": {"pipeline_fsdp_ag_once": True},
}  # fmt: skip
"""Other layers or options than Llama's. Mixtures fail with ``tensor`` or ``expert`` beside
``tensor_transpose``: shapes do not match when they are traced, with ``use_ring_of_experts`` too."""
LETTERS = {
    "t": "tensor", "u": "tensor_transpose", "f": "fsdp", "p": "pipeline", "c": "context",
    "d": "data", "s": "sequence", "e": "expert",
}  # fmt: skip
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
SMALLEST = 50_000
"""Bytes below which a call is of scales or statistics."""


def compiled(sizes: dict[str, Any], degrees: dict[str, int], policy: str) -> Any:
    """The optimized program of one case."""
    import jax
    import jax.numpy as jnp
    import MaxText
    from flax import linen as nn
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from MaxText import maxtext_utils, pyconfig
    from MaxText.layers import models

    ranks = math.prod(degrees.values())
    each = sizes.get("samples", degrees.get("pipeline", 1))
    samples = math.prod(degrees.get(name, 1) for name in ("data", "fsdp", "expert")) * each
    options = {
        **FIXED, "remat_policy": policy, "per_device_batch_size": samples,
        "max_target_length": sizes["tokens"], "base_emb_dim": sizes["hidden"],
        "base_mlp_dim": sizes["width"], "base_moe_mlp_dim": sizes["width"],
        "base_num_query_heads": sizes["heads"], "base_num_kv_heads": 8, "ici_fsdp_parallelism": 1,
        **{f"ici_{name}_parallelism": number for name, number in degrees.items()},
        **MODELS.get(sizes.get("model", ""), {}),
    }  # fmt: skip
    if "pipeline" in degrees:
        options |= {
            "num_layers_per_pipeline_stage": 1,
            "num_pipeline_microbatches": sizes.get("microbatches", each),
        }
    slices = {
        4: "v5e:2x2", 8: "v5e:2x4", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4",
        128: "v5p:4x4x8",
    }  # fmt: skip
    devices = topologies.get_topology_desc(slices[ranks], platform="tpu").devices
    base = os.path.join(os.path.dirname(MaxText.__file__), "configs", "base.yml")
    with contextlib.redirect_stdout(io.StringIO()):
        config = pyconfig.initialize(["", base, *(f"{k}={v}" for k, v in options.items())])
        mesh = Mesh(maxtext_utils.create_device_mesh(config, devices), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=None, model_mode="train")
    shape = (samples, sizes["tokens"])
    rules = config.logical_axis_rules

    def start(key: Any) -> Any:
        ids = jnp.zeros(shape, jnp.int32)
        keys = {"params": key, "dropout": key, "aqt": key}
        return model.init(keys, ids, ids, ids, enable_dropout=False)

    def loss(weights: Any, ids: Any) -> Any:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        out = model.apply(
            weights, ids, places, jnp.ones_like(ids), enable_dropout=False,
            rngs={"dropout": jax.random.PRNGKey(0), "params": jax.random.PRNGKey(1)},
            mutable=["intermediates"],
        )  # fmt: skip
        return jnp.sum(jnp.square(out[0].astype(jnp.float32)))

    with mesh, nn.partitioning.axis_rules(rules):
        boxed = jax.eval_shape(start, jax.random.PRNGKey(0))
        places = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
        weights = jax.tree.map(
            lambda w, at: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=at),
            nn.unbox(boxed), places,
        )  # fmt: skip
        spec = nn.logical_to_mesh_axes(config.input_data_sharding_logical_axes, rules)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec))
        step = jax.jit(jax.grad(loss), out_shardings=places)
        readable = {
            "xla_tpu_enable_async_collective_fusion": "false",
            "xla_tpu_enable_latency_hiding_scheduler": "false",
            "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        }
        return step.lower(weights, tokens).compile(compiler_options=readable)


def members(line: str) -> list[int]:
    """Devices of a call's first group; of a permute, of the first pair of two."""
    import numpy as np

    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(number) for number in listed.group(1).split(",")]
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
    if pairs:
        return next(([int(a), int(b)] for a, b in pairs if a != b), [])
    order = r"\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)"
    meshed = re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids={order})? ?\{{(.*?)\}}", line)
    if meshed:
        names = re.findall(r"'(\w+)'=(\d+)", meshed.group(1))
        dims = [int(size) for _, size in names]
        devices = np.arange(math.prod(dims))
        if meshed.group(2):
            devices = devices.reshape([int(n) for n in meshed.group(2).split(",")])
            if meshed.group(3):
                devices = devices.transpose([int(n) for n in meshed.group(3).split(",")])
        over = re.findall(r"'(\w+)'", meshed.group(4))
        taken = tuple(slice(None) if name in over else 0 for name, _ in names)
        return [int(n) for n in devices.reshape(dims)[taken].ravel()]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    devices = np.arange(math.prod(int(n) for n in iota.group(2).split(",")))
    devices = devices.reshape([int(n) for n in iota.group(2).split(",")])
    if iota.group(3):
        devices = devices.transpose([int(n) for n in iota.group(3).split(",")])
    return [int(n) for n in devices.reshape([int(n) for n in iota.group(1).split(",")])[0]]


def axes_of(group: list[int], degrees: dict[str, int]) -> str:
    """Mesh axes along which the devices of a group differ."""
    found, step = [], 1
    for name in reversed(AXES):
        size = degrees.get(name, 1)
        if len({device // step % size for device in group}) > 1:
            found.append(name)
        step *= size
    return " ".join(reversed(found))


def calls(text: str, degrees: dict[str, int]) -> list[list[Any]]:
    """Pass, place, kind, axes, bytes and number of the collectives of a program."""
    computation, callers, found = "", dict[str, tuple[str, str]](), []
    for line in text.split("\n"):
        opened = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            computation = opened.group(1)
            continue
        named = re.search(r'op_name="([^"]*)"', line)
        name = named.group(1) if named else ""
        called = re.search(r"calls=%?([\w.\-]+)", line)
        if called:
            callers.setdefault(called.group(1), (computation, name))
        made = re.search(rf"= (\(?[^=]*?) ({KINDS})(-start)?\(", line)
        if made:
            found.append((computation, name, made.group(1), made.group(2), made.group(3), line))
    listed = Counter[tuple[str, str, str, str, int]]()
    for inside, name, shape, kind, start, line in found:
        if inside.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        name = name or callers.get(inside, ("", ""))[1]
        tensors = re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind == "collective-permute":
            tensors = tensors[:1]
        elif start and kind == "all-gather":
            tensors = tensors[1:]
        size = sum(
            BYTES.get(dtype, 1) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in tensors
        )
        if size < SMALLEST:
            continue
        again, back = "rematted" in name, "transpose(" in name
        phase = "again" if again else "backward" if back else "forward"
        place = next(
            (p for p in ("self_attention", "Moe", "mlp", "embed", "logits") if p in name), "rest"
        )
        listed[phase, place, kind, axes_of(members(line), degrees), size] += 1
    return [[*call, number] for call, number in sorted(listed.items())]


def kept(text: str) -> int:
    """Bytes of a layer that wait for its backward: what the loop over layers stacks, one sample."""
    (loop,) = [
        line
        for line in text.split("\n")
        if " while(" in line and line.rstrip().split("op_name=")[-1].startswith('"jit(loss)/jvp')
    ]
    stacked = re.findall(r"(bf16|f32)\[2,1,([\d,]+)\]", loop.partition(" while(")[0])
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",")) for dtype, dims in stacked)


def main() -> None:
    """Every case, a line each."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    for name in (
        "grain", "grain.python", "tensorflow", "tensorboardX", "jaxtyping", "google.cloud", "PIL",
    ):  # fmt: skip
        module = MagicMock()
        module.__path__, module.__spec__ = [], None
        sys.modules[name] = module
    from flax import nnx

    read = nnx.Variable.get_metadata

    def metadata(self: Any, *names: Any, **options: Any) -> Any:
        """What MaxText 0.1.0 reads as ``sharding`` is ``out_sharding`` since flax 0.12."""
        found = read(self, *names, **options)
        if not names and "out_sharding" in found:
            found = {**found, "sharding": found["out_sharding"]}
        return found

    nnx.Variable.get_metadata = metadata
    for sizes, degrees, policy in CASES:
        text = str(compiled(sizes, degrees, policy).as_text())
        found = {**sizes, "degrees": degrees, "policy": policy, "calls": calls(text, degrees)}
        print(json.dumps({**found, "kept": kept(text)}), flush=True)
    for shape, samples, layout in BESIDE:
        words = layout.split()
        policy = words.pop() if words[-1].isalpha() else "minimal_with_context"
        degrees = {LETTERS[word[0]]: int(word[1:]) for word in words if word[1:] != "1"}
        sizes = {**shape, "samples": samples}
        program = compiled(sizes, degrees, policy)
        found = {**sizes, "degrees": degrees, "policy": policy}
        found["calls"] = calls(str(program.as_text()), degrees)
        found["temporaries"] = int(program.memory_analysis().temp_size_in_bytes)
        found["flops"] = int(program.cost_analysis()["flops"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
