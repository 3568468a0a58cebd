"""Context parallelism and schedules of MindFormers, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.cp_kinds import cp_kind_code, cp_kind_of
from cost_models.graph import Shard
from cost_models.leaf import ChunkCosts
from cost_models.memory import activation_bytes
from cost_models.state import local_parameters
from cost_models.step import price_layer
from cost_models.traffic import layer_calls, recomputed_calls
from planner.errors import InputError
from planner.pipeline import evaluate, plan, read_request
from planner.predict import price
from planner.recompute import named_policy
from planner.request import Request
from planner.space import enumerate_meshes
from planner.studies.communication import communication
from planner.studies.verify import verify

VOCABULARY = 128_256 * 4096


def request(model: str = "llama-3.1-8b", **overrides: object) -> Request:
    asked = {"stack": "mindformers", "sequence_length": 8192, "global_batch": 16} | overrides
    return read_request(model, "atlas-910b:2", None, asked)


def weights(**layout: object) -> int:
    found = evaluate(request(), {"zero_stage": 0, "tp": 4, **layout})
    terms = {term.name: term.bytes or 0 for term in found.prediction.stages[0].memory}
    return terms["weights"]


def test_the_embedding_is_whole_on_every_rank_under_context_parallelism() -> None:
    """Over 4 ranks a quarter of the table becomes all of it, two bytes a weight."""
    split = weights(dp_replicate=4, sequence_parallel=False)
    whole = weights(dp_replicate=2, cp=2, sequence_parallel=False)
    assert whole - split == 2 * VOCABULARY * 3 // 4


def test_a_whole_embedding_reduces_nothing() -> None:
    def names(**layout: object) -> list[str]:
        asked = {"zero_stage": 0, "tp": 4, "sequence_parallel": False, **layout}
        found = communication(request(), evaluate(request(), asked))
        return [call.name for call in found.layers["embedding"] if call.phase == "forward"]

    assert names(dp_replicate=4) == ["embedding.reduce"]
    assert names(dp_replicate=2, cp=2) == []


def test_sequence_parallelism_and_context_parallelism_exclude_each_other() -> None:
    with pytest.raises(InputError, match="does not combine with context parallelism"):
        evaluate(request(), {"tp": 2, "cp": 2, "sequence_parallel": True})
    with pytest.raises(InputError, match="latent attention is missing"):
        evaluate(request("deepseek-v3"), {"cp": 2, "ep": 1})


def test_all_ranks_wait_for_the_one_with_the_last_queries() -> None:
    """Gathered, the last of two ranks does 3/2 of the average; exchanged, all do as much."""
    layout = {"dp_replicate": 8, "cp": 2, "zero_stage": 0}
    seconds = {}
    for kind in ("all_gather", "a2a"):
        found = evaluate(request(), {**layout, "cp_kind": kind})
        terms = {term.name: term.seconds or 0.0 for term in found.prediction.time}
        seconds[kind] = terms["attention"]
    assert seconds["all_gather"] == pytest.approx(1.5 * seconds["a2a"], rel=0.05)


def test_two_levels_of_context_parallelism_wait_for_the_last_group() -> None:
    """Over 8 ranks that exchange heads in pairs, the last of 4 groups does 7/4 of the average, and
    gathers keys and values of 4, or sees them pass round a ring of 4: a kernel for each block that
    passes, of which small ones run slower."""
    layout = {"dp_replicate": 2, "cp": 8, "zero_stage": 0}
    seconds, calls = {}, {}
    for kind, inner in (("a2a", 1), ("a2a_all_gather", 2), ("a2a_p2p", 2), ("p2p", 1)):
        asked = {**layout, "cp_kind": kind, "cp_inner": inner}
        found = evaluate(request(), asked)
        terms = {term.name: term.seconds or 0.0 for term in found.prediction.time}
        seconds[kind] = terms["attention"]
        layers = communication(request(), found).layers
        (layer,) = (layers[name] for name in layers if name not in ("embedding", "head"))
        calls[kind] = {(c.name, c.phase, c.ranks) for c in layer if c.name.startswith("cp_")}
    assert seconds["a2a_all_gather"] == pytest.approx(7 / 4 * seconds["a2a"], rel=0.05)
    for kind, share in (("a2a_p2p", 7 / 4), ("p2p", 15 / 8)):
        assert share < seconds[kind] / seconds["a2a"] < 1.2 * share
    exchanges = {("cp_exchange", phase, 2) for phase in ("forward", "backward")}
    for kind, outer in (("a2a_all_gather", "cp_gather"), ("a2a_p2p", "cp_ring")):
        assert calls[kind] == exchanges | {(outer, p, 4) for p in ("forward", "backward")}


def test_every_way_to_split_a_context_is_searched() -> None:
    asked = request(constraints={"fix": {"cp": 8, "tp": 1, "pp": 1}})
    found = {
        (kind, int(inner))
        for meshes in enumerate_meshes(asked)
        for kind, inner in map(cp_kind_of, meshes.cp_kind[meshes.cp == 8].tolist())
    }
    two = {(kind, n) for kind in ("a2a_all_gather", "a2a_p2p") for n in (2, 4)}
    assert found == {("all_gather", 1), ("a2a", 1), ("p2p", 1)} | two
    best = plan(asked)
    assert verify(best) == []


def test_gpipe_is_searched_and_keeps_more_than_1f1b() -> None:
    asked = request(constraints={"fix": {"pp": 4}, "schedule": "gpipe"})
    assert plan(asked).layout.schedule == "gpipe"
    peaks = {
        schedule: evaluate(
            request(), {"pp": 4, "dp_replicate": 4, "zero_stage": 0, "schedule": schedule}
        ).prediction.max_peak_bytes
        for schedule in ("gpipe", "1f1b")
    }  # fmt: skip
    assert peaks["gpipe"] >= peaks["1f1b"]


def test_the_operators_of_select_recompute_are_searched() -> None:
    names = {policy.name for policy in request().workload.policies}
    assert names == {
        "selective", "sp_gather", "mlp_act+sp_gather", "layernorm+mlp_act+sp_gather",
        "core_attn+layernorm+mlp_act+sp_gather", "full",
    }  # fmt: skip


def test_gathered_inputs_are_kept_or_gathered_again() -> None:
    """Over four ranks with sequence parallelism attention and feed-forward gather 8,192 tokens of
    4,096 each. Kept, they are not gathered in the backward; run again, three quarters go."""
    one = np.ones(1, dtype=np.int64)
    place = Shard(8192, one, 4 * one, one, one, one, np.ones(1, dtype=bool), one)
    found = request()
    (kind,) = found.workload.kinds.values()
    again = named_policy("sp_gather", found.stack)
    (kept, _), (less, _) = activation_bytes(kind, place, None), activation_bytes(kind, place, again)
    assert int(kept[0] - less[0]) == 2 * 8192 * 4096 * 2 * 3 // 4
    calls = layer_calls(kind, place, found.machine)
    gathers = [call.name for call in calls if (call.kind, call.phase) == ("all_gather", "backward")]
    assert gathers == ["proj.scatter", "fc2.scatter"]
    more = recomputed_calls(kind, place, found.machine, again)
    assert [call.name for call in more] == ["qkv.gather", "fc1.gather"]
    forward = sum(call.bytes for call in calls if call.name in ("qkv.gather", "fc1.gather"))
    assert sum(call.bytes for call in more) == forward
    seconds = price_layer(kind, place, found.machine).repeats.seconds((again,))
    assert float(seconds[0, 0]) > 0


def test_local_parameters_of_the_embedding() -> None:
    one = np.ones(2, dtype=np.int64)
    place = Shard(
        8192, one, 4 * one, np.array([1, 2]), one, one, np.zeros(2, dtype=bool),
        one * cp_kind_code("all_gather"),
    )  # fmt: skip
    held = local_parameters(request().workload.embedding, place, 1)
    assert held.dense.tolist() == [VOCABULARY // 4, VOCABULARY]


def chunk(recompute: str, layers: int | None = None) -> ChunkCosts:
    """The first of two stages of 16 layers."""
    asked: dict[str, object] = {"pp": 2, "tp": 4, "recompute": recompute}
    if layers is not None:
        asked["recompute_layers"] = layers
    own = request()
    return price(evaluate(own, asked).layout, own).ranks[0].chunks[0]


def test_some_layers_run_again_in_one_way_and_the_rest_in_another() -> None:
    """5 whole layers and 11 with select_recompute: backward and tensors in between, in proportion;
    and 3 of 16 layers with it beside 13 that keep everything."""
    whole, some, none = (chunk(mode) for mode in ("full", "selective", "none"))
    mixed, few = chunk("full/selective", 5), chunk("selective", 3)
    for name in ("backward_ns", "activation_bytes"):
        ends = getattr(none, name)
        full, less = getattr(whole, name) - ends, getattr(some, name) - ends
        assert getattr(mixed, name) - ends == 5 * full // 16 + 11 * less // 16
        assert getattr(few, name) - ends == 3 * less // 16
        assert full % 16 == less % 16 == 0
    assert mixed.forward_ns == none.forward_ns
    assert mixed.working_bytes == max(whole.working_bytes, some.working_bytes)


def test_two_modes_of_a_stage_are_stated_and_read_again() -> None:
    asked = request()
    layout = evaluate(
        asked, {"pp": 2, "tp": 4, "recompute": "full/selective", "recompute_layers": 5}
    )
    parts = [(part.mode, part.layers) for part in layout.layout.stages[1].recompute]
    assert parts == [("full", 5), ("selective", 11)]
    assert evaluate(asked, layout.layout.model_dump()).prediction == layout.prediction


@pytest.mark.parametrize("mode", ["selective/full", "sp_gather/layernorm"])
def test_modes_that_do_not_mix_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match="run again all that those behind them"):
        evaluate(request(), {"recompute": mode})
    other = {"stack": "megatron-core", "sequence_length": 4096, "global_batch": 16}
    with pytest.raises(InputError, match="all layers of a stage again in one way"):
        evaluate(
            read_request("llama-3.1-8b", "dgx-h100:2", None, other), {"recompute": "full/none"}
        )


def test_a_mixture_is_found_where_memory_is_short_and_holds_against_the_recheck() -> None:
    limits = {"fix": {"pp": 2, "tp": 1, "microbatch_size": 1}, "forbid": ("vpp", "cp")}
    found = plan(request(constraints=limits | {"schedule": "1f1b"}))
    modes = [[part.mode for part in stage.recompute] for stage in found.layout.stages]
    assert max(len(own) for own in modes) == 2
    assert verify(found) == []


def test_a_layout_names_three_kinds_of_recomputation_in_a_stage() -> None:
    """LayerSetting counts the first layers of each pattern: of 8 layers 2 run again whole, 3 with
    their activation and norms, 3 with their activation. A third mode lies between two."""
    job = {"stack": "mindformers", "sequence_length": 4096, "global_batch": 64}
    asked = read_request("llama-3.1-8b", "atlas-910b:2", None, job)
    more, less = "layernorm+mlp_act+sp_gather", "selective"
    runs = {
        name: evaluate(asked, {"tp": 4, "pp": 4, "recompute": name, "recompute_layers": 2})
        for name in (f"full/{more}", f"full/3*{more}/{less}", f"full/{less}")
    }
    first, third, second = runs.values()
    assert first.prediction.step_time_s > third.prediction.step_time_s
    assert third.prediction.step_time_s > second.prediction.step_time_s
    assert first.prediction.max_peak_bytes < third.prediction.max_peak_bytes
    assert third.prediction.max_peak_bytes < second.prediction.max_peak_bytes
    stated = [(part.mode, part.layers) for part in third.layout.stages[0].recompute]
    assert stated == [("full", 2), (more, 3), (less, 3)]
    again = evaluate(asked, third.layout.model_dump(mode="json"))
    assert again.prediction == third.prediction
    for wrong in (f"full/{more}/{less}", f"full/3*{less}/{more}"):
        with pytest.raises(InputError):
            evaluate(asked, {"tp": 4, "pp": 4, "recompute": wrong, "recompute_layers": 2})
