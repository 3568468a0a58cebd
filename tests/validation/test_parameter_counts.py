"""Parameter counts against models built by real software, and against published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.blocks.weights import parameter_counts, parameters_of
from planner.models import catalog
from planner.models.reader import model_from_document, read_model
from planner.models.spec import ModelSpec

DATA = json.loads((Path(__file__).parent / "data" / "parameter_counts.json").read_text())["models"]


def read_decoder(name: str) -> ModelSpec:
    """A model of the catalogue that is a decoder."""
    model = read_model(name)
    assert isinstance(model, ModelSpec)
    return model


READ = sorted(DATA)
NOT_AS_PUBLISHED = {"meta-llama--Llama-4-Maverick-17B-128E-Instruct"}
"""Reference configs without the vision tower of the published model, which the catalogue has."""


PROJECTOR_APART = {"meta-llama--Llama-4-Maverick-17B-128E-Instruct": 7680 * 5120}
"""Projections into the decoder that the built model holds outside its tower."""


def test_every_reference_model_is_there() -> None:
    assert len(DATA) == 47


@pytest.mark.parametrize("name", READ)
def test_counts_equal_the_built_model(name: str) -> None:
    expected = DATA[name]
    counts = parameter_counts(model_from_document(expected["config"], where=name))
    assert counts.total == expected["total"]
    assert counts.embedding == expected["embedding"]
    assert counts.head == expected["lm_head"]
    assert counts.active == expected["active"]
    assert counts.routed_experts == expected["routed_experts"]
    assert counts.vision == expected["vision"] + PROJECTOR_APART.get(name, 0)


def test_the_towers_are_counted() -> None:
    assert sum(entry["vision"] > 0 for entry in DATA.values()) >= 7


MTP = {
    "deepseek-v3": 7168 * (2 * 7168 + 3) + 11_507_286_016,
    "deepseek-v2-lite": 0,
    "minimax-m2": 0,
}
"""DeepSeek-V3's module (arXiv 2412.19437, section 2.2): a projection of 2 x 7168 to 7168, three
norms and one layer of the mixture, counted below. MiniMax ships none of the modules it names."""


def test_mtp_is_counted_apart() -> None:
    # One layer: latent attention, 256 routed experts and a shared one, a router.
    hidden, heads = 7168, 128
    attention = (
        hidden * 1536 + 1536 + 1536 * heads * 192 + hidden * (512 + 64) + 512
        + 512 * heads * (128 + 128) + heads * 128 * hidden
    )  # fmt: skip
    experts = 257 * 3 * hidden * 2048 + 256 * hidden
    layer = attention + experts + 2 * hidden
    assert MTP["deepseek-v3"] == hidden * (2 * hidden + 3) + layer
    for name, expected in MTP.items():
        assert parameter_counts(read_decoder(name)).mtp == expected


@pytest.mark.parametrize("name", sorted(set(READ) - NOT_AS_PUBLISHED))
def test_catalogue_model_has_the_counts_of_its_public_id(name: str) -> None:
    counts = parameter_counts(read_model(name.replace("--", "/")))
    assert counts.total == DATA[name]["total"]
    assert counts.embedding == DATA[name]["embedding"]
    assert counts.active == DATA[name]["active"]


PTDP = {
    "gpt-1.7b": 1.7,
    "gpt-3.6b": 3.6,
    "gpt-7.5b": 7.5,
    "gpt-18.4b": 18.4,
    "gpt-39.1b": 39.1,
    "gpt-76.1b": 76.1,
    "gpt-145.6b": 145.6,
    "gpt-310.1b": 310.1,
    "gpt-529.6b": 529.6,
    "gpt-1t": 1008.0,
}
"""Parameters in billions as arXiv 2104.04473, Table 1, prints them."""


@pytest.mark.parametrize("name", sorted(PTDP))
def test_megatron_series_has_the_published_size(name: str) -> None:
    # Equation 2 of the paper, P = 12 l h^2 (1 + 13/(12h) + (V + s)/(12 l h)), counts everything
    # but the final LayerNorm's 2h.
    model = read_model(name)
    layers, hidden = model.layer_count, model.hidden
    formula = 12 * layers * hidden**2 + 13 * layers * hidden + (51200 + 2048) * hidden
    counts = parameter_counts(model)
    assert counts.total == formula + 2 * hidden
    assert counts.total / 1e9 == pytest.approx(PTDP[name], abs=0.05)


PYTHIA = {
    "pythia-1b": (1_011_781_632, 805_736_448),
    "pythia-1.4b": (1_414_647_808, 1_208_602_624),
    "pythia-2.8b": (2_775_208_960, 2_517_652_480),
    "pythia-6.9b": (6_857_302_016, 6_444_163_072),
    "pythia-12b": (11_846_072_320, 11_327_027_200),
}
"""Total and non-embedding parameters: model cards of EleutherAI's Pythia suite."""


@pytest.mark.parametrize("name", sorted(PYTHIA))
def test_pythia_has_the_published_counts(name: str) -> None:
    counts = parameter_counts(read_model(name))
    assert (counts.total, counts.total - counts.embedding - counts.head) == PYTHIA[name]


def test_catalogue_is_broad_and_every_model_reads() -> None:
    entries = catalog.catalog_models()
    assert len(entries) >= 30
    for entry in entries:
        model = read_model(entry.name)
        assert model.name == entry.name
        assert model.family == entry.family
        assert model.source == entry.source
        assert parameters_of(model)["total"] > 1e6


CATALOG = json.loads((Path(__file__).parent / "data" / "catalog_counts.json").read_text())["models"]


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_catalogue_model_equals_the_built_one(name: str) -> None:
    counts = parameter_counts(read_decoder(name))
    assert counts.total == CATALOG[name]["total"]
    assert counts.embedding == CATALOG[name]["embedding"]
    assert counts.routed_experts == CATALOG[name]["routed_experts"]


STATED = {
    "gpt3-125m": 0.125, "gpt3-350m": 0.356, "gpt3-760m": 0.760, "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.7, "gpt3-6.7b": 6.7, "gpt3-13b": 13.0, "gpt3-175b": 174.6,
    "megatron-22b": 22.0, "turing-nlg-530b": 530.0, "nemotron-4-15b": 15.6,
    "nemotron-4-340b": 341.0,
}  # fmt: skip
"""Billions of parameters as the papers named in the files print them."""


@pytest.mark.parametrize("name", sorted(STATED))
def test_catalogue_model_has_the_size_that_its_paper_states(name: str) -> None:
    assert parameter_counts(read_decoder(name)).total / 1e9 == pytest.approx(STATED[name], rel=0.02)


def test_every_catalogue_file_is_checked_against_something() -> None:
    checked = {*CATALOG, *STATED, *PTDP}
    decoders = {
        entry.name
        for entry in catalog.catalog_models()
        if isinstance(read_model(entry.name), ModelSpec)
    }
    assert decoders == checked
    assert len(decoders) >= 60
