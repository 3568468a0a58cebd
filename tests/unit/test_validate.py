"""Reading published runs, and what validation says of them."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError
from planner.studies.measured import measured
from planner.studies.ranking import ranking
from planner.studies.runs import REQUIRED, Run, read_runs
from planner.studies.validate import prepare, validate

RUN = {
    "id": "one", "source": "somewhere", "model": "a model", "notes": "a note", "year": "2025",
    "framework": "megatron-core", "layers": "8", "hidden": "2048", "heads": "16",
    "kv_heads": "4", "ffn_hidden": "8192", "gated_mlp": "1", "vocab": "32000",
    "tied_embeddings": "0", "seq": "2048", "precision": "bf16", "accelerator": "H100-80GB",
    "gpus": "16", "gpus_per_node": "8", "tp": "2", "sp": "1", "pp": "2", "vpp": "1", "cp": "1",
    "dp": "4", "zero_stage": "1", "mbs": "1", "gbs": "64", "recompute": "none",
    "step_time_s": "1.5", "step_time_basis": "iter_s",
}  # fmt: skip
"""A run that states everything it needs."""


def text_of(*runs: dict[str, str]) -> str:
    """The runs as CSV text with the columns of the first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(runs[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    return out.getvalue()


def row_of(**changes: str) -> dict[str, Any]:
    """The only row of a validation of ``RUN`` with ``changes``."""
    (row,) = validate(text_of({**RUN, **changes}))["rows"]
    return dict(row)


def test_a_complete_run_is_priced_without_a_policy() -> None:
    row = row_of()
    assert (row["status"], row["reason"], row["stack"]) == ("priced", None, "megatron-core")
    assert row["policy_filled"] == []
    assert row["measured_step_time_s"] == 1.5
    assert row["measured_basis"] == "step_time_s:iter_s"
    low, high = row["band_s"]
    assert 0 < low < row["predicted_step_time_s"] < high
    assert row["fits"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accelerator": "WSE-2"}, "accelerator not in the catalogue: WSE-2"),
        ({"accelerator": ""}, "no accelerator"),
        ({"framework": "abacus"}, "no stack for framework abacus"),
        ({"framework": ""}, "no framework"),
        ({"gbs": ""}, "no global batch"),
        ({"seq": "0"}, "no sequence length"),
        ({"layers": "eight"}, "no layer count"),
        ({"precision": "int8"}, "precision not modelled: int8"),
        ({"precision": "nvfp4"}, "h100-sxm-80gb has no nvfp4 arithmetic"),
        ({"precision": "fp8", "accelerator": "A100"}, "a100-sxm-80gb has no fp8 arithmetic"),
        ({"offload": "activations"}, "offload not modelled: activations"),
        ({"schedule": "zero bubble"}, "schedule not modelled: zero bubble"),
        ({"recompute": "custom"}, "recomputation not modelled: custom"),
        ({"gpus": "12"}, "12 devices do not fill nodes of 8"),
        ({"tp": "3"}, "tp 3 x pp 2 x cp 1 does not divide 16 devices"),
    ],
)
def test_a_run_that_cannot_be_priced_says_why(changes: dict[str, str], reason: str) -> None:
    base = {"offload": "", "schedule": ""}
    row = row_of(**{**base, **changes})
    assert (row["status"], row["reason"]) == ("skipped", reason)
    assert row["predicted_step_time_s"] is None
    assert row["scored"] is False


@pytest.mark.parametrize(
    ("framework", "stack"),
    [("Megatron-Core", "megatron-core-mxfp8"), ("Megatron-LM", "megatron-core-mxfp8"),
     ("Megatron-Bridge", "megatron-bridge-mxfp8"), ("NeMo", "nemo-mxfp8")],
)  # fmt: skip
def test_the_recipe_of_a_run_of_megatron_is_that_of_its_label(framework: str, stack: str) -> None:
    row = row_of(framework=framework, precision="mxfp8", accelerator="B200")
    assert (row["status"], row["stack"]) == ("priced", stack)
    assert row_of(framework="Megatron-Core", precision="fp8")["stack"] == "megatron-core"


@pytest.mark.parametrize(
    ("changes", "stack"),
    [
        ({"framework": "NeMo", "layers": "96", "hidden": "12288", "year": "2024"},
         "nemo-flash2-bf16-gradients"),
        ({"framework": "NeMo", "layers": "96", "hidden": "12288", "year": "2025"},
         "nemo-bf16-gradients"),
        ({"framework": "NeMo/Megatron-Core", "layers": "32", "hidden": "4096", "precision": "fp8"},
         "nemo-fp8-flash2"),
        ({"framework": "NeMo/Megatron-Core", "layers": "32", "hidden": "4096", "precision": "fp8",
          "accelerator": "B200"}, "nemo-fp8"),
        ({"framework": "NeMo/Megatron-Core", "attention_kernel": "FlashAttention-2"},
         "nemo-flash2"),
        ({"framework": "NeMo/Megatron-Core", "attention_kernel": "flash2"}, "nemo-flash2"),
    ],
)  # fmt: skip
def test_releases_of_nemo_that_turn_fused_attention_off(
    changes: dict[str, str], stack: str
) -> None:
    row = row_of(**changes)
    assert (row["status"], row["stack"]) == ("priced", stack)


@pytest.mark.parametrize(
    ("changes", "stack"),
    [
        ({"hidden": "4096"}, "nemo"),
        ({"hidden": "8192"}, "nemo-bf16-gradients"),
        ({"hidden": "8192", "gradient_dtype": "fp32"}, "nemo"),
        ({"hidden": "8192", "precision": "fp8"}, "nemo-fp8"),
        # Nemotron-4 15B, before and from v25.04 on.
        ({"hidden": "6144", "mbs": "4"}, "nemo"),
        ({"hidden": "6144", "mbs": "2"}, "nemo-bf16-gradients"),
    ],
)
def test_recipes_of_nemo_that_reduce_gradients_in_16_bits(
    changes: dict[str, str], stack: str
) -> None:
    row = row_of(framework="NeMo", **changes)
    assert (row["status"], row["stack"]) == ("priced", stack)
    silent = changes.keys().isdisjoint({"gradient_dtype", "precision"})
    assert ("gradient_dtype" in row["policy_filled"]) is silent


@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        ({"accelerator": "GB200", "gpus_per_node": ""}, "mla_up_proj"),
        ({"accelerator": "H100"}, "mla_up_proj+mlp"),
        ({"accelerator": "B200", "pp": "8", "dp": "2"}, "mla_up_proj+mlp"),
        ({"accelerator": "GB300", "gpus_per_node": "", "precision": "bf16"}, "moe_act"),
        ({"accelerator": "H100", "recompute": "moe+mla_up_proj"}, "mla_up_proj+moe"),
        ({"accelerator": "H100", "experts": "128"}, None),
    ],
)
def test_modules_that_megatron_bridge_runs_again_are_those_of_its_recipe(
    changes: dict[str, str], recompute: str | None
) -> None:
    row = RUN | {
        "framework": "Megatron-Bridge", "precision": "fp8", "mla": "1", "experts": "256",
        "experts_active": "8", "moe_ffn_hidden": "512", "moe_layers": "6", "recompute": "",
        "tp": "1", "dp": "8", "ep": "2", "zero_stage": "1",
    }  # fmt: skip
    layout = prepare(read_runs(text_of(row | changes))[0]).layout
    modes = {group.mode for stage in layout.stages for group in stage.recompute}
    assert modes == ({recompute} if recompute else set())


def test_old_runs_of_zero_3_keep_their_inputs_in_parts() -> None:
    row = RUN | {"framework": "Megatron+DeepSpeed ZeRO-3 (old branch)", "year": "2021",
                 "precision": "fp16", "pp": "1", "sp": "0", "zero_stage": "3",
                 "recompute": "full", "gated_mlp": "0"}  # fmt: skip
    for tp, mode in (("1", "full"), ("2", "partitioned")):
        dp = str(16 // int(tp))
        layout = prepare(read_runs(text_of(row | {"tp": tp, "dp": dp}))[0]).layout
        assert {group.mode for stage in layout.stages for group in stage.recompute} == {mode}


def test_mixtures_of_automodel_are_in_16_bits() -> None:
    row = {"framework": "NeMo AutoModel (FSDP2)", "pp": "1", "tp": "1", "dp": "16", "vpp": ""}
    mixture = {"experts": "8", "experts_active": "2", "ep": "8", "recompute": ""}
    prepared = prepare(read_runs(text_of(RUN | row | mixture))[0])
    assert prepared.request.stack.name == "nemo-automodel-bf16"
    assert prepared.request.job.optimizer == "adamw_bf16"
    assert prepare(read_runs(text_of(RUN | row))[0]).request.stack.name == "nemo-automodel"


def test_chunks_that_a_row_leaves_out_are_those_of_its_recipe() -> None:
    row = RUN | {
        "framework": "NeMo/Megatron-Core", "layers": "40", "hidden": "5120", "pp": "4", "vpp": "",
        "tp": "1", "dp": "4",
    }  # fmt: skip
    assert prepare(read_runs(text_of(row))[0]).layout.vpp == 10
    assert prepare(read_runs(text_of(row | {"vpp": "2"}))[0]).layout.vpp == 2


def test_a_batch_that_no_layout_divides_names_the_numbers() -> None:
    row = row_of(gbs="62")
    assert row["status"] == "skipped"
    assert "62 samples is not a multiple of dp 4" in row["reason"]


def test_redistribution_moves_layers_off_the_stage_with_the_logits() -> None:
    # hidden 2048, sequence 2048: a layer is 12 h^2 + 2 s h = 58.7 M, logits over 64,000 are 131 M,
    # 2.2 layers. 8 layers over 2 stages: (5, 3) is max(294, 307), (6, 2) is max(352, 249), and
    # (4, 4) is max(235, 366): five layers go first.
    plain = row_of(vocab="64000", schedule="1F1B")
    moved = row_of(vocab="64000", schedule="1F1B (redis)")
    assert moved["predicted_step_time_s"] < plain["predicted_step_time_s"]
    run = read_runs(text_of({**RUN, "vocab": "64000", "schedule": "1F1B (redis)"}))[0]
    stages = prepare(run).layout.stages
    assert [stage.chunks[0].layers for stage in stages] == [(0, 5), (5, 8)]


@pytest.mark.parametrize(
    ("stack", "changes", "layers"),
    [
        # 10 layers on 4 stages: two each and two over.
        ("InternEvo", {}, [2, 2, 3, 3]),
        ("Megatron-DeepSpeed", {}, [3, 3, 3, 1]),
        ("Megatron-DeepSpeed", {"precision": "bf16"}, [2, 3, 3, 2]),
        ("torchtitan", {}, [2, 3, 3, 2]),
    ],
)  # fmt: skip
def test_layers_that_an_even_split_leaves_over_go_where_the_stack_puts_them(
    stack: str, changes: dict[str, str], layers: list[int]
) -> None:
    text = {"framework": stack, "precision": "fp16", "layers": "10", "pp": "4", "dp": "4"}
    text |= {"precision": "bf16"} if stack == "torchtitan" else changes
    run = read_runs(text_of({**RUN, **text, "schedule": "1F1B"}))[0]
    stages = prepare(run).layout.stages
    held = [stage.chunks[0].layers for stage in stages]
    assert [last - first for first, last in held] == layers


def test_a_vocabulary_cut_to_what_tp_divides_is_not_padded() -> None:
    # One rank computes 50,257 logits, an odd number that tensor cores run at half their rate; two
    # compute 25,128 each. Other years pad both to multiples of 128, and so do runs on
    # several nodes.
    changes = {"framework": "Megatron-DeepSpeed", "vocab": "", "pp": "1", "gated_mlp": "0",
               "gpus": "8", "nodes": "1"}  # fmt: skip
    alone, split = (
        prepare(read_runs(text_of({**RUN, **changes, "year": "2023", "tp": tp, "dp": dp}))[0])
        for tp, dp in (("1", "8"), ("2", "4"))
    )
    assert [each.request.model.vocab for each in (alone, split)] == [50257, 50256]
    assert alone.request.stack.vocab_divisor == 1
    nodes = {"gpus": "16", "nodes": "2", "year": "2023", "dp": "16"}
    for other in ({"year": "2022", "dp": "8"}, nodes):
        padded = prepare(read_runs(text_of({**RUN, **changes, "tp": "1", **other}))[0])
        assert padded.request.model.vocab == 50257
        assert padded.request.stack.vocab_divisor == 128


def test_interleaving_a_partial_group_of_microbatches_names_the_numbers() -> None:
    # 60 samples over dp 4 are 15 microbatches: 7 turns of pp 2 and one left over. A policy that
    # interleaves what did not run interleaved meets such runs.
    run = {**RUN, "gbs": "60", "framework": "torchtitan", "recompute": "none"}
    stated = validate(text_of({**run, "vpp": "2"}))["rows"][0]
    assumed = validate(text_of({**run, "vpp": ""}), changes={"vpp": 2})["rows"][0]
    for row in (stated, assumed):
        assert row["status"] == "skipped"
        assert "equal rounds of at least pp = 2 microbatches; 15 = 7 x 2 + 1" in (row["reason"])
    assert row_of(vpp="2")["status"] == "priced"


@pytest.mark.parametrize(
    "column", ["recompute", "zero_stage", "sp", "tied_embeddings", "precision"]
)
def test_a_blank_is_filled_and_counted(column: str) -> None:
    row = row_of(**{column: ""})
    assert row["status"] == "priced"
    assert row["policy_filled"] == [column]


def test_what_does_not_matter_is_not_counted() -> None:
    # sp without tp, vpp without pp, ep without experts and ZeRO on one rank decide nothing.
    row = row_of(gpus="1", gpus_per_node="1", tp="1", pp="1", dp="1", sp="", vpp="", zero_stage="")
    assert (row["status"], row["policy_filled"]) == ("priced", [])


def test_another_policy_changes_the_prediction_only_where_the_row_is_silent() -> None:
    silent = text_of({**RUN, "recompute": ""})
    plain = validate(silent)["rows"][0]["predicted_step_time_s"]
    full = validate(silent, changes={"recompute": "full"})["rows"][0]["predicted_step_time_s"]
    assert full > plain
    stated = validate(text_of(RUN), changes={"recompute": "full"})["rows"][0]
    assert stated["predicted_step_time_s"] == row_of()["predicted_step_time_s"]


def test_order_names_sources_and_notes_change_no_prediction() -> None:
    runs = [
        {
            **RUN, "id": str(index), "layers": str(4 + 4 * (index % 3)), "tp": str(1 + index % 2),
            "dp": str(8 // (1 + index % 2)),
            "framework": ("megatron-core", "NeMo", "torchtitan")[index % 3],
        }
        for index in range(9)
    ]  # fmt: skip
    known = {row["id"]: row["predicted_step_time_s"] for row in validate(text_of(*runs))["rows"]}
    assert None not in known.values()
    assert len(set(known.values())) > 3
    stripped = [{**run, "model": f"m{i}", "source": "", "notes": ""} for i, run in enumerate(runs)]
    random.Random(7).shuffle(stripped)
    again = validate(text_of(*stripped))["rows"]
    assert [row["id"] for row in again] == [run["id"] for run in stripped]
    assert {row["id"]: row["predicted_step_time_s"] for row in again} == known


def test_every_row_appears_once_in_order() -> None:
    runs = [RUN, {**RUN, "id": "two", "gbs": ""}, {**RUN, "id": ""}]
    document = validate(text_of(*runs))
    assert [row["id"] for row in document["rows"]] == ["one", "two", "3"]
    summary = document["summary"]
    assert (summary["rows"], summary["priced"]) == (3, 2)
    assert summary["skipped"] == {"no global batch": 1}
    assert (summary["denominator"], summary["share_priced"]) == (2, 1.0)


def test_an_adapter_run_is_priced_but_not_scored() -> None:
    full, adapter = row_of(), row_of(model="llama3-8b LoRA")
    assert adapter["predicted_step_time_s"] == full["predicted_step_time_s"]
    assert (full["scored"], adapter["scored"]) == (True, False)


def test_adapters_are_priced_as_what_they_are() -> None:
    full = row_of(framework="NeMo/Megatron-Core", sp="0")
    lora = row_of(framework="NeMo/Megatron-Core", sp="0", adapters="LoRA")
    # No gradients of frozen weights, and no update of them.
    assert lora["predicted_step_time_s"] < 0.95 * full["predicted_step_time_s"]
    assert lora["predicted_peak_gib"] < full["predicted_peak_gib"]
    assert lora["policy_filled"] == ["gradient_dtype", "lora_rank"]
    assert row_of(framework="NeMo/Megatron-Core", adapters="ptuning")["reason"] == (
        "adapters not modelled: ptuning"
    )
    assert row_of(adapters="lora")["reason"] == "no lora_rank"
    assert row_of(adapters="lora", lora_rank="8")["status"] == "priced"


def test_a_run_whose_source_calls_its_size_invalid_is_priced_but_not_scored() -> None:
    stated, disowned = row_of(mem_gib="20"), row_of(mem_gib="20", notes="INVALID SIZE: ran 58B")
    assert disowned["predicted_peak_gib"] == stated["predicted_peak_gib"]
    assert (stated["scored"], disowned["scored"]) == (True, False)
    assert (stated["measured_peak_gib"], disowned["measured_peak_gib"]) == (20, None)


def test_more_than_the_peak_is_not_scored() -> None:
    # 3,513,778,176 causal FLOPs per token (see below) x 8192 tokens a device in 29.1 ms are
    # 989.2 TFLOP/s; the H100's dense bf16 peak is 989.
    impossible, possible = row_of(step_time_s="0.0290"), row_of(step_time_s="0.0292")
    assert (impossible["status"], impossible["scored"]) == ("priced", False)
    assert impossible["warnings"] == [
        "the stated figures imply 100% of the device's peak: not scored"
    ]
    assert (possible["scored"], possible["warnings"]) == (True, [])


def test_a_formula_is_no_memory_reading() -> None:
    assert row_of(source="korthikanti-2205.05198", mem_gib="40")["measured_peak_gib"] is None
    assert row_of(source="torchtitan", mem_gib="40")["measured_peak_gib"] == 40
    # 40 GB are 40e9 / 2^30 GiB.
    gigabytes = row_of(source="bigscience-a100", mem_gib="40")["measured_peak_gib"]
    assert gigabytes == pytest.approx(37.2529, abs=1e-4)


def test_a_gate_compares_the_median() -> None:
    row = row_of()
    error = abs(row["predicted_step_time_s"] / 1.5 - 1) * 100
    gate = validate(text_of(RUN), fail_above=error + 0.1)["summary"]["gate"]
    assert gate["median_percent"] == pytest.approx(error)
    assert gate["passed"] is True
    assert validate(text_of(RUN), fail_above=error - 0.1)["summary"]["gate"]["passed"] is False


class TestMeasured:
    """Step times from other figures of ``RUN``."""

    def test_iteration_time_stands_in_for_the_scored_one(self) -> None:
        row = row_of(step_time_s="", iter_s="1.25")
        assert (row["measured_step_time_s"], row["measured_basis"]) == (1.25, "iter_s")

    def test_tokens_per_second(self) -> None:
        # 64 samples x 2048 tokens / (1024 tokens/s x 16 devices) = 8 s.
        row = row_of(step_time_s="", tokens_per_s_per_gpu="1024")
        assert row["measured_step_time_s"] == 8
        assert row["measured_basis"] == "tokens_per_s_per_gpu"

    def test_model_flops_count_all_pairs_by_default(self) -> None:
        # Parameters of a matrix kind that a token meets: per layer 2048 x (2048 + 2 x 512) for
        # q, k, v, 2048 x 2048 out, 3 x 2048 x 8192 MLP = 60,817,408; 8 layers and the head of
        # 32000 x 2048 make 552,075,264. Attention: 4 x 2048 hidden x 2048 keys x 8 layers forward.
        # 6 x 552,075,264 + 3 x 134,217,728 = 3,715,104,768 FLOPs per token; 8192 tokens a device
        # at 100 TFLOP/s take 0.30434 s.
        row = row_of(step_time_s="", tflops_per_gpu_model="100")
        assert row["measured_basis"] == "tflops_per_gpu_model:full"
        assert row["measured_step_time_s"] == pytest.approx(0.304341, rel=1e-5)

    def test_a_causal_source_counts_half_the_pairs(self) -> None:
        # 6 x 552,075,264 + 1.5 x 134,217,728 = 3,513,778,176.
        row = row_of(source="ml-engineering", step_time_s="", tflops_per_gpu_model="100")
        assert row["measured_basis"] == "tflops_per_gpu_model:causal"
        assert row["measured_step_time_s"] == pytest.approx(0.287849, rel=1e-5)

    def test_utilisation_is_of_the_dense_peak_of_the_runs_precision(self) -> None:
        # 40 % of 989 TFLOP/s: 3,715,104,768 x 8192 / 395.6e12 = 0.076932 s.
        row = row_of(step_time_s="", mfu="40")
        assert row["measured_basis"] == "mfu:full:bf16"
        assert row["measured_step_time_s"] == pytest.approx(0.0769315, rel=1e-5)

    def test_no_figure_is_no_time(self) -> None:
        row = row_of(step_time_s="")
        assert (row["status"], row["measured_step_time_s"], row["measured_basis"]) == (
            "priced", None, None,
        )  # fmt: skip
        assert measured(Run(0, {"gpus": "8"})).step_time_s is None


class TestMachine:
    """Clusters from the accelerator and link columns."""

    @pytest.mark.parametrize(
        ("link", "nics", "name"),
        [
            ("", 8, "infiniband-ndr"),
            ("8 x 400Gb/s NDR IB per node", 8, "infiniband-ndr"),
            ("1600 Gbps node-node RoCE", 4, "roce-400g"),
            ("4 x 100Gb RoCE per node", 4, "roce-100g"),
            ("RDMA 400 Gb/s per GPU", 8, "infiniband-ndr"),
            ("EFA", 32, "efa-v2"),
            ("4 x 100 Gb/s Omni-Path", 4, "omni-path-100"),
        ],
    )
    def test_links(self, link: str, nics: int, name: str) -> None:
        from planner.studies.machines import cluster_of, machine_columns

        (run,) = read_runs(text_of({**RUN, "inter_link": link}))
        node = cluster_of(machine_columns(run)).groups[0].node
        assert (node.nics, node.scale_out.name) == (nics, name)

    def test_a_policy_may_fill_the_link(self) -> None:
        run = {"framework": "Megatron-DeepSpeed", "year": "2022", "accelerator": "A100-80GB",
               "sp": "0", "gated_mlp": "0", "kv_heads": "16"}  # fmt: skip
        filled, faster, earlier = (
            row_of(**{**run, **change})
            for change in ({}, {"inter_link": "8 x 200 Gb/s InfiniBand"}, {"year": "2021"})
        )
        assert "inter_link" in filled["policy_filled"]
        assert "inter_link" not in faster["policy_filled"] + earlier["policy_filled"]
        assert filled["predicted_step_time_s"] > faster["predicted_step_time_s"]
        assert faster["predicted_step_time_s"] == earlier["predicted_step_time_s"]

    def test_part_of_a_node_has_only_its_devices(self) -> None:
        from planner.studies.machines import cluster_of, machine_columns

        (run,) = read_runs(text_of({**RUN, "gpus": "4"}))
        cluster = cluster_of(machine_columns(run))
        assert (cluster.devices, cluster.nodes) == (4, 1)


class TestReading:
    """Bad files."""

    def refused(self, text: str | Path, words: str) -> None:
        with pytest.raises(InputError, match=words):
            read_runs(text)

    def test_missing_column(self) -> None:
        for column in REQUIRED:
            run = {key: value for key, value in RUN.items() if key != column}
            self.refused(text_of(run), f"missing column {column}")

    def test_misspelt_column_has_a_hint(self) -> None:
        with pytest.raises(InputError) as error:
            read_runs(text_of(RUN).replace("accelerator", "acelerator"))
        assert error.value.hint is not None
        assert "acelerator" in error.value.hint

    def test_files(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "absent.csv", "cannot be read")
        self.refused(tmp_path, "cannot be read")
        binary = tmp_path / "binary.csv"
        binary.write_bytes(b"\xff\xfe\x00\x01")
        self.refused(binary, "not a text file")
        self.refused("\n\n", "empty")
        self.refused(",".join(REQUIRED) + "\n", "no runs")
        self.refused("gpus,gpus\n1,2\n", "twice")
        self.refused(text_of(RUN) + ",".join("x" * 99) + "\n", "cells for")
        self.refused('"' + text_of(RUN), "not a CSV file")

    def test_a_byte_order_mark_and_short_rows_are_fine(self, tmp_path: Path) -> None:
        file = tmp_path / "runs.csv"
        file.write_bytes(b"\xef\xbb\xbf" + text_of(RUN).encode() + b"lonely\n")
        first, second = read_runs(file)
        assert first.text("id") == "one"
        assert dict(second.cells) == {"id": "lonely"}


def test_a_sweep_is_ranked_and_its_regret_measured() -> None:
    # Three layouts of one model: predicted order 1, 2, 3 against measured 2, 1, 3 s.
    runs = [(("s", "m"), (str(i),), float(i + 1), (2.0, 1.0, 3.0)[i]) for i in range(3)]
    found = ranking(runs)["s"]
    # Two of three pairs agree: tau = (2 - 1) / 3. The first is taken: 2 s against 1 s.
    assert found["tau"] == pytest.approx(1 / 3)
    assert found["worst_regret"] == pytest.approx(1.0)
    assert (found["sweeps"], found["layouts"]) == (1, 3)


def test_repeats_of_one_layout_are_one_entry() -> None:
    repeats = [(("s",), ("a",), 1.0, measured) for measured in (1.0, 5.0, 2.0)]
    assert ranking(repeats) == {}
    assert ranking([*repeats, (("s",), ("b",), 2.0, 3.0)])["s"]["mean_regret"] == 0


def test_runs_of_two_releases_are_no_sweep() -> None:
    one = RUN | {"source": "s", "source_where": "github o/recipes v24.11 README.md", "tp": "2"}
    two = one | {"tp": "4", "source_where": "github o/recipes v25.02 README.md"}
    assert validate(text_of(one, two))["summary"]["ranking"] == {}
    same = two | {"source_where": "github o/recipes v24.11 docs/other.md"}
    assert validate(text_of(one, same))["summary"]["ranking"]["s"]["layouts"] == 2


def test_a_group_that_shards_less_than_all_ranks_is_replicated() -> None:
    row = RUN | {"framework": "internevo", "zero_stage": "1", "tp": "1", "pp": "1", "mbs": "1"}
    run = read_runs(text_of(row | {"gpus": "16", "shard_group": "8"}))[0]
    layout = prepare(run).layout
    assert (layout.dp_shard, layout.dp_replicate, layout.zero_stage) == (8, 2, 1)
    whole = prepare(read_runs(text_of(row | {"gpus": "16"}))[0]).layout
    assert (whole.dp_shard, whole.dp_replicate) == (16, 1)
