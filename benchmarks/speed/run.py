"""Cold start to JSON: seconds and peak memory of whole ``planner plan`` processes on one core.

``python benchmarks/speed/run.py`` prints a table; ``--write`` also rewrites
``benchmarks/results/speed.md``. Each case runs ``RUNS`` times after a warm-up: the median counts.
The warm-up leaves compiled modules behind, as an installation does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed.md"
RUNS = 5
COMPILED = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
"""The environment of the processes: they keep their compiled modules."""
CASES = {
    "Llama-3.1-8B on 8 H100": ["llama-3.1-8b", "dgx-h100:1"],
    "GPT-3 175B on 1,024 A100": ["gpt3-175b", "dgx-a100:128"],
    "Mixtral-8x7B on 64 H100": ["mixtral-8x7b", "dgx-h100:8"],
    "Llama-3.1-70B on 64 H100": ["llama-3.1-70b", "dgx-h100:8"],
    "Llama-3.1-405B on 16,384 H100": ["llama-3.1-405b", "dgx-h100:2048"],
    "GPT 1T on 3,072 A100": ["gpt-1t", "dgx-a100:384"],
    "Qwen3-235B-A22B on 256 B200": ["qwen3-235b-a22b", "dgx-b200:32"],
    "DeepSeek-V3 on 2,048 H800": ["deepseek-v3", "hgx-h800:256"],
    "DeepSeek-V3 on 2,048 H800, batch 15,360 x 4,096, fp8": [
        "deepseek-v3", "hgx-h800:256", "--seq-len", "4096", "--global-batch", "15360",
        "--precision", "fp8",
    ],
}  # fmt: skip


def measure(arguments: list[str]) -> tuple[float, dict[str, object]]:
    """Wall seconds and the certificate of one process pinned to one core."""
    start = time.perf_counter()
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-m", "planner", "plan", *arguments],
        cwd=ROOT, env=COMPILED, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - start, json.loads(done.stdout)["certificate"]


def peak_of(arguments: list[str]) -> float:
    """Peak MiB of one process, measured by a parent of its own."""
    code = (
        "import resource,subprocess,sys;"
        "subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL,check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "planner", "plan", *arguments, "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


def table() -> str:
    """The results as Markdown."""
    lines = [
        "| request | median s | min s | max s | peak MiB | space_size | simulated | status |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, arguments in CASES.items():
        measure(arguments)
        runs = [measure(arguments) for _ in range(RUNS)]
        walls = sorted(run[0] for run in runs)
        proof = runs[0][1]
        lines.append(
            f"| {title} | {statistics.median(walls):.2f} | {walls[0]:.2f} | {walls[-1]:.2f} | "
            f"{peak_of(arguments):.0f} | {proof['space_size']:,} | {proof['simulated_count']} | "
            f"{proof['status']} |"
        )
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def header() -> str:
    """Machine, commit and versions."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    ).stdout.strip()  # fmt: skip
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "pydantic", "typer"))
    return (
        "# Speed\n\n"
        "Whole processes, from start to JSON, pinned to one core; median of "
        f"{RUNS} after a warm-up.\nMade by `python benchmarks/speed/run.py --write`.\n\n"
        f"- machine: {model}, {os.cpu_count()} cores seen, one used\n"
        f"- commit: {commit}\n"
        f"- Python {platform.python_version()}, {packages}\n"
    )


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of whole processes.")
    parser.add_argument("--write", action="store_true", help="rewrite results/speed.md")
    write = parser.parse_args().write
    text = f"{header()}\n{table()}\n"
    print(text)
    if write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
