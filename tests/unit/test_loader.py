"""Devices, links, nodes and clusters by name, alias and file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from hardware_profiles import loader
from hardware_profiles.documents import DocumentError
from hardware_profiles.schema import ClusterSpec, Kind, LinkSpec


def _refused(ref: str, stdin: str | None = None) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        loader.load_cluster(ref, stdin=stdin)
    return caught.value


@pytest.mark.parametrize("name", loader.catalog_names("link"))
def test_every_link_loads(name: str) -> None:
    link = loader.load_link(name)
    assert link.name == name
    assert link.bandwidth.si > 1e9
    assert 0 < link.latency.si < 1e-3


@pytest.mark.parametrize("name", loader.catalog_names("node"))
def test_every_node_loads(name: str) -> None:
    node = loader.load_node(name)
    assert node.name == name
    for alias in node.aliases:
        assert loader.load_node(alias) is node


@pytest.mark.parametrize("kind", ["device", "link", "node", "stack", "cluster"])
def test_names_and_aliases_are_unique(kind: loader.Kind) -> None:
    names = loader.catalog_names(kind)
    assert names == sorted(names)
    assert not set(names) & set(loader.catalog_aliases(kind))


@pytest.mark.parametrize(
    ("node", "devices", "per_node_bandwidth"),
    [
        # Ports x rate: 8 x 200 Gb/s = 200 GB/s; 8 x 400 Gb/s = 400; 4 x 100 Gb/s = 50.
        ("dgx-a100", 8, 200e9),
        ("dgx-h100", 8, 400e9),
        ("hgx-h800", 8, 400e9),
        ("aws-p4d", 8, 50e9),
        ("aws-p5", 8, 400e9),
        ("aws-p5en", 8, 400e9),
        ("aws-p6-b200", 8, 400e9),
        ("gcp-a3-mega", 8, 200e9),
        ("rtx4090-x1", 1, 12.5e9),
    ],
)
def test_node_bandwidths(node: str, devices: int, per_node_bandwidth: float) -> None:
    spec = loader.load_node(node)
    assert spec.devices_per_node == devices
    assert spec.nics * spec.scale_out.bandwidth.si == per_node_bandwidth


def test_h800_link_is_the_h100_link_at_200_of_450() -> None:
    full, cut = loader.load_link("nvlink4"), loader.load_link("nvlink4-h800")
    assert cut.bandwidth.si / full.bandwidth.si == pytest.approx(200 / 450)
    for a, b in zip(full.collectives, cut.collectives, strict=True):
        assert (a.collective, a.devices, a.latency_s) == (b.collective, b.devices, b.latency_s)
        assert b.bandwidth / a.bandwidth == pytest.approx(200 / 450, rel=1e-3)
        assert b.borrowed_from is not None


def test_short_form_counts_nodes() -> None:
    cluster = loader.load_cluster("dgx-h100:128")
    assert (cluster.name, cluster.nodes, cluster.devices) == ("dgx-h100:128", 128, 1024)
    assert cluster.is_homogeneous
    assert loader.load_cluster("dgx-h100").devices == 8
    assert loader.load_cluster("selene:1_0").devices == 80


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("dgx-h100:0", "0 nodes; at least 1"),
        ("dgx-h100:-3", "-3 nodes; at least 1"),
        ("dgx-h100:abc", "'abc' is not a number of nodes"),
        ("dgx-h100:1.5", "'1.5' is not a number of nodes"),
        ("dgx-h100:", "the number of nodes is missing"),
        (":4", "the node type is missing"),
        ("dgx-h100:99999999999", "at most 1000000"),
    ],
)
def test_bad_short_forms(ref: str, says: str) -> None:
    error = _refused(ref)
    assert says in error.message
    assert error.hint is not None
    assert "NODE_TYPE:NODES" in error.hint


def test_unknown_names_get_suggestions() -> None:
    assert "dgx-h100" in str(_refused("dgx-h10:4").hint)
    assert "llama3-h100-16384" in str(_refused("llama3-h100").hint)
    assert "NODE_TYPE:NODES" in str(_refused("zzzzzz").hint)
    with pytest.raises(DocumentError) as caught:
        loader.load_link("nvlink44")
    assert caught.value.hint is not None
    assert "'nvlink4'" in caught.value.hint
    assert "no such file" in _refused("missing/cluster.yaml").message


def test_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nnode: dgx-h100\nnodes: 128\nnetwork: {leaf_nodes: 32, oversubscription: 2}\n"
    )
    cluster = loader.load_cluster(str(path))
    assert (cluster.name, cluster.devices) == ("mine", 1024)
    assert [(tier.name, tier.nodes, tier.oversubscription) for tier in cluster.tiers] == [
        ("leaf", 32, 2.0),
        ("spine", None, 1.0),
    ]
    text = path.read_text()
    assert loader.load_cluster("-", stdin=text) == cluster


def test_standard_input_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        buffer = io.BytesIO(b"node: dgx-a100\nnodes: 2")

    monkeypatch.setattr(sys, "stdin", Pipe())
    assert loader.load_cluster("-").devices == 16


def test_node_mapping_extends_the_catalogue() -> None:
    text = (
        "node: {extends: dgx-h100, scale_out: ethernet-400g, nics: 4, host_link: 64 GB/s}\nnodes: 2"
    )
    node = loader.load_cluster("-", stdin=text).groups[0].node
    assert node.name == "dgx-h100-custom"
    assert (node.nics, node.scale_out.name) == (4, "ethernet-400g")
    assert node.device == loader.load_device("h100-sxm-80gb")
    assert (node.host_link.si, node.host_link.kind) == (64e9, Kind.ASSUMED)
    assert loader.load_node("dgx-h100").nics == 8


def test_node_file_beside_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text("extends: dgx-h100\nname: box\nnics: 2\n")
    (tmp_path / "farm.yaml").write_text("node: ./box.yaml\nnodes: 3\n")
    cluster = loader.load_cluster(str(tmp_path / "farm.yaml"))
    assert (cluster.name, cluster.groups[0].node.nics) == ("box:3", 2)
    assert loader.load_cluster(f"{tmp_path}/box.yaml:5").nodes == 5


def test_groups_of_unlike_nodes_load() -> None:
    text = "groups:\n- {node: dgx-h100, count: 2}\n- {node: dgx-a100, count: 1}"
    cluster = loader.load_cluster("-", stdin=text)
    assert (cluster.nodes, cluster.devices, cluster.is_homogeneous) == (3, 24, False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node: dgx-h100\nnodes: 0", "nodes: must be greater than or equal to 1, got 0"),
        ("node: dgx-h100\nnodes: -4", "got -4"),
        ("node: dgx-h100\nnodes: two", "got 'two'"),
        ("node: dgx-h100\nnodes: true", "nodes: must not be true or false, got True"),
        ("node: dgx-h100", "'nodes' is missing"),
        ("nodes: 3", "'node' is missing"),
        ("groups: []", "groups"),
        ("groups:\n- {node: dgx-h100, count: 1}\nnodes: 3", "not both"),
        ("node: nope\nnodes: 3", "unknown node 'nope'"),
        ("node: {extends: dgx-h100, scale_out: nope}\nnodes: 3", "scale_out: unknown link 'nope'"),
        ("node: {extends: dgx-h100, nics: 0}\nnodes: 3", "nics"),
        ("node: {extends: dgx-h100, host_link: 5 parsecs}\nnodes: 3", "unknown unit 'parsecs'"),
        ("node: {extends: dgx-h100, host_link: fast}\nnodes: 3", "cannot read 'fast'"),
        ("node: {extends: dgx-h100, host_link: -5 GB/s}\nnodes: 3", "must be finite and >= 0"),
        ("node: dgx-h100\nnodes: 4\nnetwork: {leaf_nodes: 2, oversubscription: 0.5}", "got 0.5"),
        ("node: dgx-h100\nnodes: 4\nnetwork: {leaf_nodes: 0}", "network.leaf_nodes"),
        ("node: dgx-h100\nnodes: 2\nlink_matrix: [[1, 2]]", "link_matrix must be 2 x 2"),
        ("node: dgx-h100\nnodes: 2\nlink_matrix: [[0, -1], [1, 0]]", "bytes/s > 0"),
        (
            "node: dgx-h100\nnodes: 4\ntiers: [{name: leaf, nodes: 4}, {name: spine, nodes: 2}]",
            "tiers go from the innermost out",
        ),
        ("[1, 2]", "expected a mapping"),
        ("just words", "expected a mapping"),
    ],
)
def test_bad_cluster_documents(text: str, says: str) -> None:
    assert says in _refused("-", text).message


def test_unknown_key_in_a_cluster_file() -> None:
    error = _refused("-", "node: dgx-h100\nnoeds: 4\nnodes: 2")
    assert "unknown key 'noeds'" in error.message
    assert error.hint is not None
    assert "'nodes'" in error.hint


def test_shipped_profiles_are_loaded_once() -> None:
    assert loader.load_node("dgx-h100") is loader.load_node("dgx-h100")
    assert loader.load_cluster("llama3-h100-16384") is loader.load_cluster("llama3-h100-16384")


def test_published_clusters() -> None:
    sizes = {name: loader.load_cluster(name).devices for name in loader.catalog_names("cluster")}
    assert sizes == {
        "deepseek-h800-2048": 2048,
        "llama3-h100-16384": 16384,
        "megatron-a100-3072": 3072,
    }


def test_a_dumped_cluster_loads_again() -> None:
    cluster = loader.load_cluster("dgx-h100:4")
    assert loader.load_cluster("-", stdin=cluster.model_dump_json()) == cluster


def test_links_refuse_what_is_not_physical() -> None:
    good = loader.load_link("infiniband-ndr").model_dump()
    for change in (
        {"bandwidth": {**good["bandwidth"], "value": 0}},
        {"efficiency": {**good["efficiency"], "value": 1.5}},
        {"scale": ((4, 0.5), (2, 1.0))},
        {"scale": ((2, 1.5),)},
    ):
        with pytest.raises(ValidationError):
            LinkSpec.model_validate({**good, **change})


def test_empty_cluster_is_refused() -> None:
    with pytest.raises(ValidationError):
        ClusterSpec(name="none", groups=())


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("p4d", "aws-p4d"),
        ("p5", "aws-p5"),
        ("p5.48xlarge", "aws-p5"),
        ("trn2", "aws-trn2"),
        ("a3-mega", "gcp-a3-mega"),
        ("a3-megagpu-8g", "gcp-a3-mega"),
        ("ND H100 v5", "azure-nd-h100-v5"),
        ("Standard_ND96isr_H100_v5", "azure-nd-h100-v5"),
        ("BM.GPU.H100.8", "oci-bm-gpu-h100-8"),
    ],
)
def test_cloud_instances_go_by_the_names_that_people_use(ref: str, name: str) -> None:
    assert loader.load_node(ref).name == name
    assert loader.load_cluster(f"{ref}:2").groups[0].node.name == name


def test_every_cloud_instance_has_its_name_without_the_cloud() -> None:
    clouds = [
        name for name in loader.catalog_names("node") if name.startswith(("aws-", "azure-", "gcp-"))
    ]
    assert len(clouds) >= 30
    for name in clouds:
        assert loader.load_node(name.split("-", 1)[1]).name == name
