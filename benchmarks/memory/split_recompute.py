"""What PyTorch's pipelines run again and keep where a split backward meets full recomputation.

    pip install torch==2.13.0 --index-url CPU_WHEELS
    python benchmarks/memory/split_recompute.py > tests/validation/data/split_recompute.json

No device and no other process is needed: a stage is a list of decoder layers, its halves are
``stage_backward_input`` and ``stage_backward_weight`` of ``torch.distributed.pipelining``. Each
case counts the forwards of a layer and the bytes of all live storages, per layer (4 less 2).
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

CASES = (
    {"hidden": 64, "intermediate": 256, "heads": 4, "kv_heads": 4, "tokens": 128},
    {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "tokens": 64},
    {"hidden": 64, "intermediate": 512, "heads": 2, "kv_heads": 1, "tokens": 256},
)


class Layer(nn.Module):
    """A decoder layer as torchtitan writes it: separate q, k, v, gate and up."""

    def __init__(self, case: dict[str, int]) -> None:
        super().__init__()
        hidden, wide, self.heads = case["hidden"], case["intermediate"], case["heads"]
        self.kv_heads, self.runs = case["kv_heads"], 0
        narrow = hidden // self.heads * self.kv_heads
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        sizes = ((hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden),
                 (hidden, wide), (hidden, wide), (wide, hidden))  # fmt: skip
        self.products = nn.ModuleList(nn.Linear(k, n, bias=False) for k, n in sizes)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        q, k, v, out, gate, up, down = self.products
        h = self.norms[0](x)
        size = (1, x.shape[1], -1, x.shape[2] // self.heads)
        parts = [product(h).view(size).transpose(1, 2) for product in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(
            *parts, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + out(mixed.transpose(1, 2).reshape(x.shape))
        h = self.norms[1](x)
        return x + down(nn.functional.silu(gate(h)) * up(h))


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        """A storage is freed."""
        self.known.discard(key)
        self.now -= size


def measure(case: dict[str, int], layers: int, *, recompute: bool) -> dict[str, int]:
    """Runs of each layer and live bytes after every part of a stage's step, weights left out."""
    stage = nn.ModuleList(Layer(case) for _ in range(layers))
    x = torch.randn(1, case["tokens"], case["hidden"], requires_grad=True)
    found: dict[str, int] = {}
    with Live() as live:
        y = x
        for layer in stage:
            y = checkpoint(layer, y, use_reentrant=False) if recompute else layer(y)
        found["forward_runs"], found["forward_bytes"] = stage[0].runs, live.now
        gradient = torch.randn_like(y)
        _, groups = stage_backward_input([y], [gradient], [x], iter(stage.parameters()))
        found["input_runs"], found["input_bytes"] = stage[0].runs, live.now
        del y, gradient
        live.peak = live.now
        stage_backward_weight(iter(stage.parameters()), groups)
        found["weight_runs"], found["weight_peak_bytes"] = stage[0].runs, live.peak
    return found


def main() -> None:
    """Print what one more layer adds, per case and mode."""
    results = []
    for case in CASES:
        for recompute in (False, True):
            two, four = (measure(case, layers, recompute=recompute) for layers in (2, 4))
            each = {
                key: (four[key] - two[key]) // 2 if key.endswith("bytes") else four[key]
                for key in four
            }
            # Autograd hands the weights over where they are first used: they are in every figure.
            weights = sum(p.numel() for p in Layer(case).parameters()) * 4
            for key in each:
                each[key] -= weights if key.endswith("bytes") else 0
            # At the peak the gradients of all weights but the last are there.
            each["weight_peak_bytes"] -= weights
            results.append({**case, "recompute": "full" if recompute else "none", **each})
    about = {
        "what": "Forwards of a layer, and bytes that each adds, in a split backward of one "
        "microbatch; weights and their gradients left out.",
        "software": f"torch {torch.__version__}",
        "made_by": "python benchmarks/memory/split_recompute.py",
    }
    print(json.dumps({"_about": about, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
