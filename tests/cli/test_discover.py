"""``planner discover`` on the tools' own formats, and on what is cut, mixed or foreign."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hardware_profiles.loader import load_cluster
from planner.errors import InputError
from planner.studies.discovery.facts import Facts
from planner.studies.discovery.hostlist import expand_hostlist
from planner.studies.discovery.parsers import parse
from tests.cli.process import planner

DATA = Path(__file__).parents[1] / "data" / "discover"


def discover(*names: str, more: tuple[str, ...] = ()) -> dict[str, object]:
    done = planner("discover", *(DATA / f"{name}.txt" for name in names), *more)
    assert done.code == 0, done.err
    assert load_cluster("-", stdin=done.out).devices > 0
    body = yaml.safe_load(done.out)
    assert isinstance(body, dict)
    return body


def test_eight_h100_and_a_scheduler() -> None:
    """Ten records: six up, two down or drained, one without devices, one of another kind."""
    body = discover("topo_h100", "q_h100", "ibstat_ndr", "scontrol")
    assert body["nodes"] == 6
    node = body["node"]
    assert isinstance(node, dict)
    assert (node["device"], node["devices_per_node"]) == ("h100-sxm-80gb", 8)
    assert (node["scale_up"], node["scale_out"], node["nics"]) == ("nvlink4", "infiniband-ndr", 8)
    assert node["host_memory"] == "2063000 MiB"


@pytest.mark.parametrize(
    ("names", "nodes", "device", "up", "out", "nics"),
    [
        (("list_h200", "sinfo"), 4, "h200-sxm-141gb", "nvlink4", "infiniband-ndr", 8),
        (("rocm_mi300x", "ibstat_roce", "nodelist"), 18, "mi300x", "xgmi-mi300x", "roce-400g", 4),
        (("topo_l40s", "q_l40s"), 1, "l40s", "pcie4-x16", "roce-400g", 1),
        (("topo_bridge", "q_a100_40"), 1, "a100-sxm-40gb", "pcie4-x16", "slingshot-11", 2),
        (("scontrol", "ibstat_ndr"), 6, "h100-sxm-80gb", "nvlink4", "infiniband-ndr", 8),
    ],
)
def test_other_machines(
    names: tuple[str, ...], nodes: int, device: str, up: str, out: str, nics: int
) -> None:
    body = discover(*names)
    node = body["node"]
    assert isinstance(node, dict)
    assert (body["nodes"], node["device"]) == (nodes, device)
    assert (node["scale_up"], node["scale_out"], node["nics"]) == (up, out, nics)


def test_other_nodes_than_the_scheduler_lists_are_said() -> None:
    body = discover("list_h200", "sinfo", more=("--nodes", "3"))
    assert body["nodes"] == 3
    done = planner("discover", DATA / "list_h200.txt", DATA / "sinfo.txt", "--nodes", "3")
    assert "note: 3 nodes as asked; the scheduler lists 4" in done.err


def test_the_file_can_be_planned_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    done = planner(
        "discover", DATA / "topo_h100.txt", DATA / "q_h100.txt", "--nodes", "2", "--name", "mine",
        "-o", path,
    )  # fmt: skip
    assert done.code == 0
    assert "8 x infiniband-ndr, the rate of dgx-h100's 8 (pass ibstat's output)" in done.err
    assert "of a rate that no file says" in path.read_text()
    planned = planner("plan", "llama-3.2-1b", path, "--format", "json")
    assert planned.code == 0
    assert planner("catalog", "check", path).code == 0


def test_no_more_adapters_than_were_found(tmp_path: Path) -> None:
    """Four of the eight H200 that a DGX has, and two adapters that nothing says the rate of."""
    gpus = [f"GPU{n}" for n in range(4)]
    columns = [*gpus, "NIC0", "NIC1"]
    rows = [
        "\t".join([a, *("X" if a == b else "NV18" if b in gpus else "PIX" for b in columns)])
        for a in gpus
    ]
    topology, names = tmp_path / "topo.txt", tmp_path / "list.txt"
    topology.write_text("\n".join(["\t" + "\t".join(columns), *rows]) + "\n")
    names.write_text("".join(f"GPU {n}: NVIDIA H200 (UUID: GPU-{n})\n" for n in range(4)))
    done = planner("discover", topology, names)
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["node"]["nics"] == 2
    assert "2 network adapters found, of a rate that no file says; 2 x infiniband-ndr" in done.err


def test_lanes_that_the_link_has_not_are_said() -> None:
    done = planner("discover", DATA / "topo_h800.txt", DATA / "q_h100.txt")
    assert done.code == 0
    assert "8 NVLink lanes per device, nvlink4 has 18" in done.err


def test_memory_tells_products_apart(tmp_path: Path) -> None:
    text = (DATA / "q_h100.txt").read_text()
    path = tmp_path / "q.txt"
    path.write_text(text.replace("H100 80GB HBM3", "H100").replace("81559", "97871"))
    done = planner("discover", path)
    assert yaml.safe_load(done.out)["node"]["device"] == "h100-96gb-hbm2e"
    path.write_text(text.replace("81559", "80000"))
    own = yaml.safe_load(planner("discover", path).out)["node"]["device"]
    assert own["memory_capacity"]["value"] == 80000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello world, this is prose\n", "no tool that is known here printed this"),
        ("", "empty"),
        ("GPU0\tX\tNV18\nGPU1\tX\n", "the row of GPU1 has 1 entries for 2 GPUs"),
        ("==== NVSMI LOG ====\nAttached GPUs : 8\n", "no 'Product Name'"),
        ("==== NVSMI LOG ====\nProduct Name : Foo 9000\n", "no device of the catalogue is called"),
        ("Product Name : NVIDIA A100\nMIG Mode\n    Current : Enabled\n", "MIG is enabled"),
        ("    Product Name : NVIDIA H100\n    Product Name : NVIDIA A100\n", "devices of 2 kinds"),
        ("CA 'mlx5_0'\n\tPort 1:\n\t\tState: Down\n\t\tRate: 10\n", "no active port"),
        ("CA 'mlx5_0'\n\tPort 1:\n\t\tState: Active\n\t\tRate: fast\n", "has rate 'fast'"),
        ("NodeName=a Arch=x86_64\n   Gres=(null) State=IDLE\n", "no node has a Gres with gpu"),
        ("NODELIST STATE\nn1 idle\n", "no GRES column"),
        ("NODELIST GRES STATE\nn1 gpu:h100:8\n", "fewer columns than the header"),
        ("NODELIST GRES STATE\n", "no nodes below the header"),
        ("NODELIST GRES STATE\nn1 gpu:h100:8 down\n", "all nodes are down or drained"),
        ("node[001-016]\n", "nothing says what the devices are"),
        ("GPU[0]\t\t: Temperature: 40\n", "neither product names nor memory"),
        ("node[5-1]\n", "runs backwards"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "saved.txt"
    path.write_text(text)
    done = planner("discover", path)
    assert done.code == 2
    assert says in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_files_of_two_nodes_contradict() -> None:
    done = planner("discover", DATA / "q_h100.txt", DATA / "topo_bridge.txt")
    assert done.code == 2
    assert "4 devices, but another file says 8" in done.err
    mixed = planner("discover", DATA / "q_a100_40.txt", DATA / "sinfo.txt")
    assert mixed.code == 2
    assert "the scheduler's nodes have 8 devices" in mixed.err
    assert planner("discover", DATA / "no-such-file.txt").code == 2


def test_binary_and_cut_files(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00\x01")
    done = planner("discover", path)
    assert done.code == 2
    assert "hint: save what the tool prints as text" in done.err
    whole = (DATA / "q_h100.txt").read_text()
    facts = Facts()
    parse(whole[: len(whole) // 2], facts, "cut")
    assert any("the file is cut" in note for note in facts.notes)
    for size in range(0, len(whole), 997):
        try:
            parse(whole[:size], Facts(), "cut")
        except InputError as error:
            assert error.message  # noqa: PT017


def test_host_lists() -> None:
    def names(text: str) -> list[str]:
        return expand_hostlist(text, where="x")

    assert names("n[08-11],m1") == ["n08", "n09", "n10", "n11", "m1"]
    assert names("r[1-2]n[1,3]") == ["r1n1", "r1n3", "r2n1", "r2n3"]
    for bad in ("n[1-", "n]1[", "n[[1]]", "n[a-b]", "n[1-999999]"):
        with pytest.raises(InputError):
            names(bad)
