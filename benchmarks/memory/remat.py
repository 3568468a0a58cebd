"""What JAX keeps of a transformer layer, and runs again, under lists of named outputs.

Needs jax (a CPU is enough) and nothing else; prints the JSON that
``tests/validation/data/remat_residuals.json`` holds. A Llama layer is scanned over, under
``jax.checkpoint`` with the names that MaxText gives its tensors; attention has a derivative of its
own, whose residuals are named ``context``, as MaxText's kernels have it. Kept are the stacked
outputs of the forward scan; run again is what the backward scan multiplies beyond the same scan
without checkpoints.

    python benchmarks/memory/remat.py > tests/validation/data/remat_residuals.json
"""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import chain, combinations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LAYERS, TOKENS = 3, 256
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 512, 8, 2, 64, 1408
NAMES = {
    "query": "query_proj",
    "key": "key_proj",
    "value": "value_proj",
    "attention": "context",
    "out_proj": "out_proj",
    "mlp_gate": "mlpwi_0",
    "mlp_up": "mlpwi_1",
    "mlp_out": "mlpwo",
}
"""Names in MaxText by what this project calls the outputs."""


HOSTED = (
    ((), ("query", "key", "value")),
    ((), ("query", "key", "value", "out_proj", "mlp_gate", "mlp_up", "mlp_out")),
    ((), ("layer_input",)),
    (("query", "key", "value"), ("layer_input", "mlp_gate")),
    (("attention", "out_proj"), ("query", "mlp_up")),
)
"""Lists of which some wait on the host: what stays on the device, and what does not."""


@jax.custom_vjp
def attention(query, key, value):
    """Stands for a fused kernel: keeps its operands, its output and a statistic."""
    return _kernel(query, key, value)[0]


def _kernel(query, key, value):
    mean = key.mean(axis=(0, 1)) + value.mean(axis=(0, 1))
    return query * mean, query.astype(jnp.float32).sum(-1)


def _forward(query, key, value):
    output, statistic = _kernel(query, key, value)
    output = checkpoint_name(output, "context")
    statistic = checkpoint_name(statistic, "context")
    return output, (query, key, value, output, statistic)


def _backward(residuals, gradient):
    query, key, value, output, statistic = residuals
    scaled = gradient * output * statistic[..., None].astype(gradient.dtype)
    return scaled * query, key * scaled.mean(), value * scaled.mean()


attention.defvjp(_forward, _backward)


def norm(x):
    scale = jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True))
    return (x * scale).astype(x.dtype)


def rotated(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(TOKENS, dtype=jnp.float32)[:, None, None]
    left, right = x[..., :half], x[..., half:]
    turned = jnp.concatenate([left * jnp.cos(angle), right * jnp.sin(angle)], -1)
    return turned.astype(x.dtype)


def layer(x, weights):
    x = checkpoint_name(x, "decoder_layer_input")
    wide = norm(x)
    query = (wide @ weights["q"]).reshape(TOKENS, HEADS, HEAD_DIM)
    key = (wide @ weights["k"]).reshape(TOKENS, KV_HEADS, HEAD_DIM)
    value = (wide @ weights["v"]).reshape(TOKENS, KV_HEADS, HEAD_DIM)
    query, key = rotated(query), rotated(key)
    query = checkpoint_name(query, "query_proj")
    key = checkpoint_name(key, "key_proj")
    value = checkpoint_name(value, "value_proj")
    context = attention(query, key, value).reshape(TOKENS, HEADS * HEAD_DIM)
    x = x + checkpoint_name(context @ weights["o"], "out_proj")
    wide = norm(x)
    gate = checkpoint_name(wide @ weights["gate"], "mlpwi_0")
    up = checkpoint_name(wide @ weights["up"], "mlpwi_1")
    down = checkpoint_name((jax.nn.silu(gate) * up) @ weights["down"], "mlpwo")
    return x + down, None


def shapes():
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {
        "q": (HIDDEN, q), "k": (HIDDEN, kv), "v": (HIDDEN, kv), "o": (q, HIDDEN),
        "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN),
    }  # fmt: skip
    return {
        name: jax.ShapeDtypeStruct((LAYERS, *size), jnp.bfloat16) for name, size in sizes.items()
    }


def product_flops(jaxpr) -> int:
    """FLOPs of the matrix products of a jaxpr, those inside its calls included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0]
            width = math.prod(left.aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * width
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += product_flops(inner)
    return total


def scans(checkpointed):
    """The forward and the backward scan of a step."""

    def loss(weights, x):
        return jax.lax.scan(checkpointed, x, weights)[0].astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes(), x)
    return [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]


def main() -> None:
    plain = product_flops(scans(layer)[1].params["jaxpr"].jaxpr)
    rows = []
    for kept, hosted in chain(
        ((kept, ()) for n in range(len(NAMES) + 1) for kept in combinations(NAMES, n)), HOSTED
    ):
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[NAMES[output] for output in kept],
            names_which_can_be_offloaded=[
                NAMES.get(output, "decoder_layer_input") for output in hosted
            ],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
        forward, backward = scans(partial(jax.checkpoint, policy=policy, prevent_cse=False)(layer))
        stacked = [out.aval for out in forward.outvars[forward.params["num_carry"] :]]
        again = product_flops(backward.params["jaxpr"].jaxpr) - plain
        size = {"device": 0, "host": 0}
        for each in stacked:
            where = "host" if each.memory_space == jax.memory.Space.Host else "device"
            size[where] += each.size * each.dtype.itemsize // LAYERS
        row = {"kept": list(kept), "hosted": list(hosted), "bytes": size["device"]}
        rows.append({**row, "host_bytes": size["host"], "product_flops_again": again})
    config = {
        "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "intermediate_size": WIDTH, "tokens": TOKENS,
    }  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    source = json.dumps(f"jax {jax.__version__}")
    print(
        f'{{\n "source": {source},\n "layer": {json.dumps(config)},\n "lists": [\n{lines}\n ]\n}}'
    )


main()
