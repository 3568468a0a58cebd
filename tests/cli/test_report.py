"""Tables: what they say, that they fit their width, and that ASCII terminals can show them."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import RenderableType

from hardware_profiles.loader import load_stack
from planner.claims import tie_break
from planner.plan import Chunk, Stage
from planner.report.catalog import entry_table
from planner.report.console import to_text
from planner.report.evaluation import evaluation_table
from planner.report.infeasibility import infeasibility_table
from planner.report.plan import plan_table
from planner.report.validation import validation_table
from planner.report.words import changes, equal_runs, extent, seconds, span
from planner.studies.summary import summarise
from tests.cli import sample

WIDTHS = [60, 80, 100, 160]
PLANS = ["dense_plan", "interleaved_plan", "moe_plan", "single_device_plan"]


def text_of(table: RenderableType, monkeypatch: pytest.MonkeyPatch, width: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    return to_text(table, stream=None)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PLANS)
def test_no_line_is_wider_than_the_terminal(name, width, monkeypatch) -> None:
    text = text_of(plan_table(getattr(sample, name)()), monkeypatch, width)
    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_stays_short(name, monkeypatch) -> None:
    assert len(text_of(plan_table(getattr(sample, name)()), monkeypatch).splitlines()) <= 64
    assert len(text_of(plan_table(getattr(sample, name)()), monkeypatch, 160).splitlines()) <= 42


def test_a_plan_says_what_an_expert_asks(monkeypatch) -> None:
    plan = sample.dense_plan()
    text = " ".join(text_of(plan_table(plan), monkeypatch, 160).split())
    for said in (
        "llama-3.1-405b on dgx-h100:2048",
        "512 x 8,192 = 4.19 M tokens per step",
        "18.0 s between 16.6 s and 19.8 s",
        "28.4 tokens/s per device",
        "41.2 % causal attention, bf16 peak 989 TFLOP/s",
        "66.5 GiB of 80.0 GiB (83 %)",
        "tp 8 + sp · pp 16 · dp_shard 128",
        "1f1b · 4 microbatches of 1 per step · ZeRO 1",
        "1-14 1024-15359 8 each (7-118) full 2",
        "13.9 s 77.2 %",
        "optimal within 0.39 %",
        "90,000 microbatch does not divide the batch",
        "19.4 s +7.8 % 61.0 GiB zero_stage 1 -> 0",
        "the cluster has 2 devices more than the layout uses",
    ):
        assert said in text


def test_a_plan_that_does_not_fit_says_by_how_much(monkeypatch) -> None:
    layout = sample.dense_plan().layout
    prediction = sample.prediction(layout, fits=False)
    text = " ".join(text_of(evaluation_table(layout, prediction), monkeypatch, 160).split())
    assert "96.5 GiB of 80.0 GiB (121 %) on the fullest device, 16.5 GiB too much" in text


def test_infeasibility_names_the_device_by_category_and_the_ways_out(monkeypatch) -> None:
    text = " ".join(text_of(infeasibility_table(sample.infeasibility()), monkeypatch).split())
    assert "needs 96.5 GiB of 80.0 GiB per device" in text
    assert "activations 66.0 GiB 68.4 %" in text
    assert "9.40 s double the nodes to 4096 fits" in text


def test_a_stream_that_is_ascii_gets_ascii(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = to_text(plan_table(sample.moe_plan()), stream=stream)
    assert text.isascii()
    assert "#####" in text


def test_no_colour_outside_a_terminal(monkeypatch) -> None:
    assert "\x1b" not in text_of(plan_table(sample.dense_plan()), monkeypatch)


def test_many_unlike_stages_are_cut_and_said(monkeypatch) -> None:
    counts = [[(rank % 2) + 3 for rank in range(36)]]
    plan = sample.dense_plan()
    layout = plan.layout.model_copy(update={"pp": 36, "stages": sample.stages(counts)})
    plan = plan.model_copy(update={"layout": layout, "prediction": sample.prediction(layout)})
    assert "24 more stages: see --format json" in text_of(plan_table(plan), monkeypatch)


def validated(count: int) -> dict[str, Any]:
    """A validation of ``count`` runs of two sources, 10 % fast and 20 % slow, and three skipped."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        source, predicted = ("ours", 9.0) if index % 2 == 0 else ("theirs", 12.0)
        rows.append(
            {
                "id": f"run-{index}", "source": source, "family": source, "stack": "megatron-core",
                "status": "priced", "scored": True, "reason": None, "policy_filled": ["sp"],
                "predicted_step_time_s": predicted, "measured_step_time_s": 10.0,
                "band_s": [0.9 * predicted, 1.15 * predicted], "predicted_peak_gib": 40.0,
                "measured_peak_gib": 42.0, "formula_peak_gib": None, "fits": True,
            }
        )  # fmt: skip
    for index in range(3):
        rows.append({**rows[0], "id": f"s{index}", "status": "skipped", "reason": "no layers"})
    return {"rows": rows, "summary": summarise(rows, denominator=[True] * len(rows))}


def test_validation_says_first_what_all_rows_say(monkeypatch) -> None:
    text = text_of(validation_table(validated(40)), monkeypatch, 100)
    assert text.index("40 of 43 rows priced; 93.0 %") < text.index("Worst rows")
    flat = " ".join(text.split())
    assert "Filled by policy: sp in 40" in flat
    # 9 s x 1.15 = 10.35 s holds the measured 10 s; 12 s x 0.9 = 10.8 s does not.
    assert "ours 20 10.0 % 10.0 % 10.0 % -10.0 % 10.0 % 100.0 %" in flat
    assert "theirs 20 20.0 % 20.0 % 20.0 % +20.0 % 20.0 % 0.0 %" in flat
    assert "all rows 40 15.0 % 15.0 % 20.0 % +5.0 % 20.0 % 50.0 %" in flat
    assert "3 no layers" in flat
    assert flat.count("run-") == 10
    assert "run-0 " not in flat


def test_validation_shows_rows_that_are_few_or_asked_for(monkeypatch) -> None:
    few = " ".join(text_of(validation_table(validated(2)), monkeypatch, 100).split())
    assert "run-0 10.0 s 9.00 s -10.0 % yes 40.0 / 42.0" in few
    assert "run-1 10.0 s 12.0 s +20.0 % no 40.0 / 42.0" in few
    every = text_of(validation_table(validated(40), every_row=True), monkeypatch, 100)
    assert every.count("run-") == 40


@pytest.mark.parametrize(
    ("value", "text"),
    [(18.0, "18.0 s"), (0.6, "600 ms"), (1234.5, "1,234 s"), (999.7, "1,000 s"),
     (2.5e-5, "25.0 us"), (3e-9, "3 ns"), (0, "0 s")],
)  # fmt: skip
def test_seconds_keep_three_digits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_extent_joins_a_range() -> None:
    assert extent([2.0, 2.0], seconds) == "2.00 s"
    assert extent([3.0, 2.0], seconds) == "2.00-3.00 s"
    assert extent([0.5, 2.0], seconds) == "500 ms-2.00 s"


def test_runs_and_spans_are_half_open() -> None:
    assert equal_runs(["a", "b", "b"]) == [(0, 1), (1, 3)]
    assert [span(0, 1), span(1, 3)] == ["0", "1-2"]


def test_changes_name_old_and_new() -> None:
    base = sample.dense_plan().layout
    other = base.model_copy(update={"tp": 4, "sequence_parallel": False})
    assert changes(base, other) == "tp 8 -> 4, sequence_parallel on -> off"
    assert changes(base, base) == "same degrees"


def test_changes_name_rounds_only_where_they_were_chosen() -> None:
    base = sample.interleaved_plan().layout
    usual = base.model_copy(update={"round_size": base.pp})
    deeper = base.model_copy(update={"pp": 2 * base.pp, "round_size": 2 * base.pp})
    longer = base.model_copy(update={"round_size": 2 * base.pp})
    assert changes(usual, deeper) == f"pp {base.pp} -> {2 * base.pp}"
    assert changes(usual, longer) == f"round_size {base.pp} -> {2 * base.pp}"


def test_an_entry_of_80_columns_keeps_its_keys_in_one_piece(monkeypatch) -> None:
    document = load_stack("deepspeed-nvme").model_dump(mode="json")
    text = text_of(entry_table("stack", document), monkeypatch)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["layers.gradient_wire_bytes_per_64", "0"] for line in lines)
    assert any("1,000 MB  datasheet: DeepSpeed" in line for line in lines)


def test_samples_keep_the_promises_of_the_document() -> None:
    for name in PLANS:
        plan = getattr(sample, name)()
        prediction = plan.prediction
        assert sum(t.seconds or 0 for t in prediction.time) == pytest.approx(prediction.step_time_s)
        for stage in prediction.stages:
            assert sum(term.bytes or 0 for term in stage.memory) == stage.peak_bytes
        assert re.fullmatch(r"sha256:[0-9a-f]{16}", plan.inputs.model.digest)
        certificate = plan.certificate
        assert sum(certificate.removed.values()) + certificate.priced == certificate.space_size


def test_a_v_says_which_layers_each_rank_holds(monkeypatch) -> None:
    held = [[(0, 5), (23, 32)], [(5, 14), (14, 23)]]
    stages = tuple(Stage(chunks=tuple(Chunk(layers=part) for part in rank)) for rank in held)
    chunks = stages[0].chunks
    chunks = (
        chunks[0].model_copy(update={"has_embedding": True}),
        chunks[1].model_copy(update={"has_head": True}),
    )
    stages = (stages[0].model_copy(update={"chunks": chunks}), stages[1])
    layout = sample.interleaved_plan().layout.model_copy(
        update={"schedule": "zbv", "pp": 2, "stages": stages}
    )
    text = text_of(evaluation_table(layout, sample.prediction(layout)), monkeypatch, 100)
    assert "embed + 5 (0-4) + 9 (23-31) + head" in text
    assert "9 (5-13) + 9 (14-22)" in text
    assert "rank r holds virtual stages r and 3 - r, so rank 0 has the head" in text


def test_a_tie_with_an_exact_optimum_says_that_none_is_faster() -> None:
    plan = sample.dense_plan()
    proof = plan.certificate.model_copy(update={"relative_gap": 0.0})
    assert (tie_break(plan.alternatives, proof) or "").endswith("no layout of the space is faster")
    proof = plan.certificate.model_copy(update={"relative_gap": 0.004})
    assert (tie_break(plan.alternatives, proof) or "").endswith("is more than 0.4 % faster")
