"""What a profile of one's own started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hardware_profiles.documents import read_document
from hardware_profiles.loader import load_stack


def shipped_stack_name(ref: str) -> str:
    """Name of the stack that ships which ``ref`` names, or which the file ``ref`` extends in the
    end; the file's own name where it extends none. Raises ``DocumentError``."""
    path = Path(ref)
    if not path.is_file():
        return load_stack(ref).name
    document = read_document(path)
    parent = document.get("extends") if isinstance(document, Mapping) else None
    if not isinstance(parent, str):
        return load_stack(ref).name
    beside = path.parent / parent
    return shipped_stack_name(str(beside) if beside.is_file() else parent)
