"""The traced software in a virtual environment of its own, made once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
DEFAULT = HERE / ".venv"


def python_of(folder: Path = DEFAULT) -> Path:
    """The interpreter of the environment in ``folder``, made or brought up to date if needed."""
    python = folder / "bin" / "python"
    stamp = folder / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True)
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    # torch first and alone: resolved together with the rest, a newer CUDA build may win.
    for wave in (lines[:1], lines):
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *wave], check=True)
    stamp.write_text(wanted)
    return python
