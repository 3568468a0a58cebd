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
