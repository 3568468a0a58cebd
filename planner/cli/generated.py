"""Write generated files, or tell which ones differ from what would be written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_or_check(files: dict[str, str], *, root: Path, check: bool) -> int:
    """Write ``files`` (path below ``root`` to text), or with ``check`` list those that differ.

    Returns 0, or 1 when ``check`` found a difference.
    """
    stale = [name for name, text in files.items() if _text(root / name) != text]
    if check:
        for name in stale:
            sys.stderr.write(f"stale: {name}\n")
        return 1 if stale else 0
    for name in stale:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(files[name], encoding="utf-8")
        sys.stderr.write(f"wrote {name}\n")
    return 0


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None
