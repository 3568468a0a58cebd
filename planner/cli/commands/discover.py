"""``planner discover``: a cluster file from what a machine's own tools print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.cli import options, output
from planner.errors import InputError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def discover(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Saved outputs, in any order; one node's."),
    ],
    nodes: Annotated[
        int | None, typer.Option("--nodes", metavar="N", min=1, help="Nodes of the cluster.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call the cluster.")
    ] = None,
    output_file: options.Output = None,
) -> None:
    """Write a cluster file from saved outputs of nvidia-smi, rocm-smi, ibstat and SLURM.

    Read are: nvidia-smi topo -m, nvidia-smi -q, nvidia-smi -L, rocm-smi --showproductname
    --showmeminfo vram, ibstat, scontrol show node, sinfo -N -o "%N %G %m %t", and a SLURM node
    list. What no file says is taken from the nearest node that ships, and said in a comment.
    """
    from hardware_profiles.documents import DocumentError, decode
    from hardware_profiles.loader import load_cluster
    from hardware_profiles.plausibility import cluster_findings
    from planner.studies.discovery.cluster import cluster_file
    from planner.studies.discovery.facts import Facts
    from planner.studies.discovery.parsers import parse

    facts = Facts()
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            text = decode(data, where=str(path))
        except DocumentError as error:
            raise InputError(error.message, hint="save what the tool prints as text") from None
        if not text.strip():
            raise InputError(f"{path}: empty")
        tool = parse(text, facts, str(path))
        sys.stderr.write(f"{path}: {tool}\n")
    sources = [path.name for path in files]
    document = cluster_file(facts, nodes=nodes, name=name, sources=sources)
    cluster = load_cluster("-", stdin=document)
    for note in (*facts.notes, *cluster_findings(cluster)):
        sys.stderr.write(f"note: {note}\n")
    output.write(document, output_file)
