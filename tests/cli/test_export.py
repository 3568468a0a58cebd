"""``planner export megatron-core``: flags by hand, refusals, and the three forms of output."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from planner.errors import InputError, UnsupportedError
from planner.exports.megatron_core import export
from planner.exports.megatron_stages import pipeline_layout, recompute_flags
from planner.exports.registry import exporter, targets
from planner.models.spec import AttentionSpec, BlockSpec, MlpSpec
from planner.plan import Plan, RecomputeLayers, Stage, to_json
from tests.cli import sample
from tests.cli.process import planner


def flags_of(plan: Plan) -> dict[str, str | None]:
    return {flag[0]: (flag[1] if len(flag) > 1 else None) for flag in export(plan).flags}


def with_layout(plan: Plan, **changes: object) -> Plan:
    return plan.model_copy(update={"layout": plan.layout.model_copy(update=changes)})


def with_model(plan: Plan, **changes: object) -> Plan:
    document = {**plan.inputs.model.document, **changes}
    model = plan.inputs.model.model_copy(update={"document": document})
    return plan.model_copy(update={"inputs": plan.inputs.model_copy(update={"model": model})})


def test_dense_model_with_uneven_stages() -> None:
    flags = flags_of(sample.dense_plan())
    expected = {
        "--num-layers": "126",
        "--hidden-size": "16384",
        "--ffn-hidden-size": "53248",
        "--num-attention-heads": "128",
        "--num-query-groups": "8",
        "--group-query-attention": None,
        "--swiglu": None,
        "--normalization": "RMSNorm",
        "--position-embedding-type": "rope",
        "--disable-bias-linear": None,
        "--untie-embeddings-and-output-weights": None,
        "--tensor-model-parallel-size": "8",
        "--sequence-parallel": None,
        "--pipeline-model-parallel-size": "16",
        "--pipeline-model-parallel-layout": "Et*7|(t*8|)*14,t*7L",
        "--recompute-granularity": "full",
        "--recompute-method": "block",
        "--recompute-num-layers": "2",
        "--micro-batch-size": "1",
        "--global-batch-size": "512",
        "--use-distributed-optimizer": None,
        "--bf16": None,
    }
    assert expected.items() <= flags.items()
    absent = {"--context-parallel-size", "--expert-model-parallel-size", "--num-experts",
              "--expert-tensor-parallel-size", "--kv-channels"}  # fmt: skip
    assert not absent & flags.keys()


def test_interleaved_stages_and_replicated_optimizer() -> None:
    flags = flags_of(sample.interleaved_plan())
    assert flags["--num-layers-per-virtual-pipeline-stage"] == "9"
    assert "--pipeline-model-parallel-layout" not in flags
    assert flags["--context-parallel-size"] == "2"
    assert flags["--cp-comm-type"] == "p2p"
    assert flags["--num-distributed-optimizer-instances"] == "2"
    assert "--recompute-granularity" not in flags


def test_latent_attention_experts_and_prediction_module() -> None:
    flags = flags_of(sample.moe_plan())
    expected = {
        "--multi-latent-attention": None,
        "--q-lora-rank": "1536",
        "--kv-lora-rank": "512",
        "--qk-head-dim": "128",
        "--qk-pos-emb-head-dim": "64",
        "--v-head-dim": "128",
        "--num-experts": "256",
        "--moe-router-topk": "8",
        "--moe-ffn-hidden-size": "2048",
        "--moe-shared-expert-intermediate-size": "2048",
        "--moe-layer-freq": "([0]*3+[1]*58)",
        "--expert-model-parallel-size": "32",
        "--expert-tensor-parallel-size": "1",
        "--mtp-num-layers": "1",
        "--pipeline-model-parallel-layout": "Et*4|(t*4|)*12,t*3|t*3|t*3mL",
        "--recompute-granularity": "selective",
    }
    assert expected.items() <= flags.items()
    assert "--sequence-parallel" not in flags


def test_dispatcher_and_routing_groups() -> None:
    plan = sample.moe_plan()
    assert flags_of(plan)["--moe-token-dispatcher-type"] == "alltoall"
    blocks = plan.inputs.model.document["blocks"]
    moe = blocks["moe"]["feed_forward"] | {"routing_groups": 8, "routing_group_limit": 4}
    plan = with_model(plan, blocks=blocks | {"moe": blocks["moe"] | {"feed_forward": moe}})
    target = plan.target.model_copy(update={"stack": "megatron-core-deepep"})
    flags = flags_of(plan.model_copy(update={"target": target}))
    expected = {
        "--moe-token-dispatcher-type": "flex",
        "--moe-enable-deepep": None,
        "--moe-router-dtype": "fp32",
        "--moe-router-num-groups": "8",
        "--moe-router-group-topk": "4",
    }
    assert {name: flags[name] for name in expected} == expected


def test_a_stack_that_is_a_recipe_names_it() -> None:
    plan = sample.moe_plan()
    document = plan.inputs.job.document | {"precision": "fp8"}
    job = plan.inputs.job.model_copy(update={"document": document})
    plan = plan.model_copy(update={"inputs": plan.inputs.model_copy(update={"job": job})})
    assert flags_of(plan)["--fp8-format"] == "hybrid"
    target = plan.target.model_copy(update={"stack": "megatron-core-mxfp8"})
    flags = flags_of(plan.model_copy(update={"target": target}))
    assert (flags["--fp8-format"], flags["--fp8-recipe"]) == ("e4m3", "mxfp8")
    assert "--bf16" in flags


def test_offloaded_inputs_are_named_with_what_transformer_engine_needs() -> None:
    plan = sample.moe_plan()
    target = plan.target.model_copy(update={"stack": "megatron-core-offload"})
    launch = export(plan.model_copy(update={"target": target}))
    assert ("--fine-grained-activation-offloading",) in launch.flags
    assert ("--offload-modules", "core_attn", "attn_proj", "expert_fc1") in launch.flags
    assert launch.environment["NVTE_CPU_OFFLOAD_V1"] == "1"
    assert "--offload-modules" not in flags_of(plan)


def test_learned_positions_biases_and_tied_embeddings() -> None:
    flags = flags_of(sample.single_device_plan())
    assert flags["--position-embedding-type"] == "learned_absolute"
    assert flags["--max-position-embeddings"] == "1024"
    assert flags["--normalization"] == "LayerNorm"
    absent = {"--disable-bias-linear", "--untie-embeddings-and-output-weights", "--swiglu",
              "--overlap-grad-reduce", "--hidden-dropout"}  # fmt: skip
    assert not absent & flags.keys()


def test_environment_is_needed_only_with_tensor_or_context_parallelism() -> None:
    assert export(sample.dense_plan()).environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert export(sample.single_device_plan()).environment == {}


@pytest.mark.parametrize(
    ("zero_stage", "strategy"), [(2, "optim_grads"), (3, "optim_grads_params")]
)
def test_zero_2_and_3_are_megatron_fsdp(zero_stage: int, strategy: str) -> None:
    flags = flags_of(with_layout(sample.dense_plan(), zero_stage=zero_stage))
    assert flags["--data-parallel-sharding-strategy"] == strategy
    assert "--use-megatron-fsdp" in flags


def test_pipeline_inside_data_parallel_has_its_own_mapping() -> None:
    order = ("tp", "cp", "pp", "dp_shard", "dp_replicate")
    assert "--use-tp-pp-dp-mapping" in flags_of(with_layout(sample.dense_plan(), rank_order=order))
    assert "--use-tp-pp-dp-mapping" not in flags_of(sample.dense_plan())


def test_hierarchical_context_parallelism_says_both_sizes() -> None:
    flags = export(with_layout(sample.dense_plan(), cp=8, cp_kind="a2a_p2p", cp_inner=2)).flags
    assert ("--cp-comm-type", "a2a+p2p") in flags
    assert ("--hierarchical-context-parallel-sizes", "2", "4") in flags


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "gpipe"}, "the schedule gpipe"),
        ({"rank_order": ("dp_shard", "tp", "cp", "pp")}, "rank order dp_shard, tp, cp, pp"),
    ],
)
def test_a_layout_without_flags_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        export(with_layout(sample.dense_plan(), **changes))


def test_a_model_without_flags_is_refused() -> None:
    block = BlockSpec(
        mixer=AttentionSpec(heads=128, kv_heads=8, head_dim=128),
        feed_forward=MlpSpec(intermediate=53248, gated=False, activation="gelu"),
        parallel=True,
    )
    plan = with_model(sample.dense_plan(), blocks={"dense": block.model_dump(mode="json")})
    with pytest.raises(UnsupportedError, match="attention and MLP in parallel"):
        export(plan)


def test_a_plan_for_another_stack_is_refused() -> None:
    plan = sample.dense_plan()
    other = plan.model_copy(update={"target": plan.target.model_copy(update={"stack": "other"})})
    with pytest.raises(InputError, match="the plan is for other"):
        export(other)


def test_a_plan_for_a_file_that_extends_the_target(tmp_path: Path) -> None:
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("extends: megatron-core-mxfp8\nname: base\n")
    own.write_text("extends: base.yaml\nname: own\n")
    plan = sample.dense_plan()
    job = plan.inputs.job.model_copy(
        update={"document": {**plan.inputs.job.document, "stack": str(own)}}
    )
    target = plan.target.model_copy(update={"stack": "own"})
    plan = plan.model_copy(
        update={"target": target, "inputs": plan.inputs.model_copy(update={"job": job})}
    )
    assert flags_of(plan)["--fp8-recipe"] == "mxfp8"
    own.write_text("extends: base.yaml\nname: own\ndeferred_head_gradients: 22\n")
    flags = flags_of(plan)
    assert flags["--wgrad-deferral-limit"] == "22"
    assert "--defer-embedding-wgrad-compute" in flags
    own.write_text("extends: torchtitan\nname: own\n")
    with pytest.raises(InputError, match="the plan is for own"):
        export(plan)


def chunks_with_recompute(sizes: list[list[int]], counts: list[int]) -> tuple[Stage, ...]:
    """Stages with ``counts`` fully recomputed layers each."""
    return sample.stages(
        sizes,
        recompute=[
            (RecomputeLayers(kind="dense", mode="full", layers=count),) if count else ()
            for count in counts
        ],
    )


@pytest.mark.parametrize(
    ("sizes", "counts", "expected"),
    [
        ([[4, 4]], [4, 4], ("uniform", "1")),
        ([[4, 4]], [2, 2], ("block", "2")),
        # min(3, layers) of each chunk: 3 + 3 on rank 0, 3 + 2 on rank 1.
        ([[4, 4], [4, 2]], [6, 5], ("block", "3")),
    ],
)
def test_recompute_counts_become_one_number(sizes, counts, expected) -> None:
    layout = sample.dense_plan().layout.model_copy(
        update={"stages": chunks_with_recompute(sizes, counts)}
    )
    flags, problems = recompute_flags(layout)
    assert problems == []
    assert dict(flags)["--recompute-method"] == expected[0]
    assert dict(flags)["--recompute-num-layers"] == expected[1]


@pytest.mark.parametrize(
    ("mode", "more"), [("full", set()), ("partitioned", {("--distribute-saved-activations",)})]
)
def test_prediction_modules_are_not_run_again(mode: str, more: set[tuple[str, ...]]) -> None:
    stages = tuple(
        stage.model_copy(
            update={
                "recompute": tuple(r.model_copy(update={"mode": mode}) for r in stage.recompute)
            }
        )
        for stage in chunks_with_recompute([[4, 4], [4, 2]], [8, 6])
    )
    layout = sample.dense_plan().layout.model_copy(update={"stages": stages})
    flags, problems = recompute_flags(layout, predicts=True)
    assert problems == []
    block = {("--recompute-method", "block"), ("--recompute-num-layers", "4")}
    assert more | block <= set(flags)
    assert ("--recompute-method", "uniform") in recompute_flags(layout)[0]


def test_layers_that_run_again_together_have_no_flag_beside_prediction_modules() -> None:
    """0.14.0 to 0.16.1, core/transformer/multi_token_prediction.py: an assertion."""
    stages = tuple(
        stage.model_copy(
            update={
                "recompute": tuple(r.model_copy(update={"mode": "full:2"}) for r in stage.recompute)
            }
        )
        for stage in chunks_with_recompute([[8]], [8])
    )
    layout = sample.dense_plan().layout.model_copy(update={"stages": stages})
    flags, problems = recompute_flags(layout, predicts=True)
    assert (flags, problems) == ([], ["recompute full:2 beside prediction modules"])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("partitioned", {("--recompute-num-layers", "1"), ("--distribute-saved-activations",)}),
        ("partitioned:2", {("--recompute-num-layers", "2"), ("--distribute-saved-activations",)}),
        ("full:3", {("--recompute-num-layers", "3")}),
    ],
)
def test_whole_layers_in_parts_and_in_groups_have_flags(
    mode: str, expected: set[tuple[str, ...]]
) -> None:
    stages = tuple(
        stage.model_copy(
            update={
                "recompute": tuple(r.model_copy(update={"mode": mode}) for r in stage.recompute)
            }
        )
        for stage in chunks_with_recompute([[8]], [8])
    )
    layout = sample.dense_plan().layout.model_copy(update={"stages": stages})
    flags, problems = recompute_flags(layout)
    assert problems == []
    assert expected | {("--recompute-method", "uniform")} <= set(flags)


def test_parts_of_some_layers_have_flags() -> None:
    stages = tuple(
        stage.model_copy(
            update={
                "recompute": tuple(
                    r.model_copy(update={"mode": "partitioned"}) for r in stage.recompute
                )
            }
        )
        for stage in chunks_with_recompute([[4, 4]], [3, 3])
    )
    flags, problems = recompute_flags(
        sample.dense_plan().layout.model_copy(update={"stages": stages})
    )
    assert problems == []
    assert {("--recompute-method", "block"), ("--recompute-num-layers", "3")} <= set(flags)
    assert ("--distribute-saved-activations",) in flags


def test_layers_on_the_host_have_a_flag() -> None:
    (stage,) = chunks_with_recompute([[8]], [8])
    part = stage.recompute[0].model_copy(update={"mode": "offload:5"})
    away = stage.model_copy(update={"recompute": (part,)})
    layout = sample.dense_plan().layout.model_copy(update={"stages": (away,)})
    assert recompute_flags(layout) == ([("--cpu-offloading-num-layers", "5")], [])


@pytest.mark.parametrize(
    ("mode", "modules"),
    [
        ("selective", ("core_attn",)),
        ("layernorm+mla_up_proj+moe_act", ("layernorm", "mla_up_proj", "moe_act")),
    ],
)
def test_recomputed_modules_are_named(mode: str, modules: tuple[str, ...]) -> None:
    again = (RecomputeLayers(kind="dense", mode=mode, layers=4),)
    held = sample.stages([[4, 4]], recompute=[again, again])
    flags, problems = recompute_flags(
        sample.dense_plan().layout.model_copy(update={"stages": held})
    )
    assert problems == []
    assert ("--recompute-modules", *modules) in flags


def test_recompute_that_differs_between_stages_is_refused() -> None:
    layout = sample.dense_plan().layout.model_copy(
        update={"stages": chunks_with_recompute([[4, 4]], [3, 1])}
    )
    flags, problems = recompute_flags(layout)
    assert flags == []
    assert problems == ["recompute that differs between stages (3, 1 layers per stage)"]


def test_layout_string_goes_through_all_ranks_of_a_virtual_stage_first() -> None:
    stages = sample.stages([[3, 2], [2, 1]])
    assert pipeline_layout(stages, mtp_layers=0) == "Et*3|tt|tt|tL"
    assert pipeline_layout(sample.stages([[1, 0, 1]]), mtp_layers=2) == "Et||tmmL"


def test_the_registry_knows_its_targets() -> None:
    assert targets() == ["megatron-core", "torchtitan"]
    assert exporter("Megatron_Core") is export


def test_one_line_for_a_launch_script() -> None:
    plan = sample.dense_plan()
    result = planner("export", "megatron-core", stdin=to_json(plan))
    assert result.code == 0
    assert result.out.count("\n") == 1
    argv = [word for flag in export(plan).flags for word in flag]
    assert result.out.split() == argv
    assert "note: set CUDA_DEVICE_MAX_CONNECTIONS=1" in result.err


def test_lines_and_json_say_the_same() -> None:
    text = to_json(sample.moe_plan())
    lines = planner("export", "megatron-core", "-", "--format", "lines", stdin=text)
    document = json.loads(
        planner("export", "megatron-core", "-", "--format", "json", stdin=text).out
    )
    assert shlex.split(lines.out) == document["argv"]
    assert document["devices"] == 2048
    assert document["target"] == "megatron-core"


def test_a_job_with_packed_documents_and_no_dropout_says_so(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "sequence_length: 1024\nglobal_batch: 8\ndocument_length: 256\ndropout: false\n"
        "constraints: {fix: {microbatch_size: 1, tp: 1, pp: 1, cp: 1}}\n"
    )
    plan = planner("plan", "gpt2-xl", "dgx-h100", str(job))
    assert plan.code == 0
    exported = planner("export", "megatron-core", "-", stdin=plan.out)
    assert exported.code == 0
    assert "--attention-dropout 0.0" in exported.out
    assert "packed documents" in exported.out + exported.err
