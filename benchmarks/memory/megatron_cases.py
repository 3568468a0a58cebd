"""Cases of a script that builds Megatron-Core's models, each in a process of its own.

Process groups and patched devices are a process's: no case may see those of another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run_cases(measure: Callable[[dict[str, Any]], Mapping[str, Any]]) -> int:
    """Print what ``measure`` makes of every case in the file that the first argument names, or of
    the one case that it is."""
    if sys.argv[1].lstrip().startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
        return 0
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        command = [sys.executable, sys.argv[0], json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(json.dumps(results, indent=1))
    return 0


def dense_config(case: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` for a dense Llama in bf16 of ``case``'s sizes and degrees,
    whose weights are laid out and not filled."""
    import torch

    return {
        "num_layers": case["layers"],
        "hidden_size": case["hidden"],
        "num_attention_heads": case["heads"],
        "num_query_groups": case["kv"],
        "ffn_hidden_size": case["ffn"],
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "tensor_model_parallel_size": case["tp"],
        "pipeline_model_parallel_size": case["pp"],
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "bias_dropout_fusion": False,
        "attention_softmax_in_fp32": True,
    }
