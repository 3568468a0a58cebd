"""What Megatron's logs say that PyTorch's caching allocator held beyond its tensors.

    python benchmarks/memory/reserved.py

``reserved.csv`` has published pairs of largest allocated and largest reserved bytes of one rank,
from the line that Megatron prints after its first iterations. The two peaks need not be at one
moment, so no more than the difference was idle when most was allocated. It contains what the
planner names (left and split blocks, a lookup's, logits that no block fits) and ``fragmentation``.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

READINGS = Path(__file__).with_name("reserved.csv")


def differences(path: Path = READINGS) -> dict[str, list[float]]:
    """GiB of reserved over allocated, a source's median as one reading, by kind of model."""
    sources: dict[tuple[str, str], list[float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            kind = "mixtures" if row["experts"] == "yes" else "dense"
            over = float(row["max_reserved_mib"]) - float(row["max_allocated_mib"])
            sources.setdefault((kind, row["source"]), []).append(over / 1024)
    found: dict[str, list[float]] = {"dense": [], "mixtures": [], "all": []}
    for (kind, _), values in sources.items():
        for name in (kind, "all"):
            found[name].append(statistics.median(values))
    return found


def main() -> None:
    """Print a row for each kind of model."""
    print("| models | sources | least GiB | median | most |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in differences().items():
        middle = statistics.median(values)
        print(f"| {name} | {len(values)} | {min(values):.2f} | {middle:.2f} | {max(values):.2f} |")


if __name__ == "__main__":
    main()
