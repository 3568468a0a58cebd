"""References to models, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.errors import InputError, UnknownModelError
from planner.models import catalog
from planner.models.reader import read_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def write(folder: Path, name: str, data: object) -> str:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("gpt3-175b", "gpt3-175b"),
        ("LLAMA-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-r1", "deepseek-v3"),
    ],
)
def test_catalogue_names_aliases_and_public_ids(reference: str, name: str) -> None:
    assert read_model(reference).name == name


def test_every_alias_is_lower_case_and_of_a_model_that_ships() -> None:
    names = {entry.name for entry in catalog.catalog_models()}
    aliases = [alias for entry in catalog.catalog_models() for alias in entry.aliases]
    index = yaml.load(catalog.INDEX.read_text(), Loader=yaml.CSafeLoader)
    assert index.keys() <= names
    assert len(aliases) == len(set(aliases))
    assert not names & set(aliases)
    assert all(alias == alias.lower() for model in index.values() for alias in model)


def test_file_folder_yaml_and_stdin_give_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    config = write(tmp_path / "tiny", "config.json", LLAMA)
    as_yaml = write(tmp_path, "other.yaml", yaml.safe_dump(LLAMA))
    models = [
        read_model(config),
        read_model(str(tmp_path / "tiny")),
        read_model(as_yaml),
        read_model("-", stdin=lambda: json.dumps(LLAMA)),
    ]
    assert [model.name for model in models] == ["tiny", "tiny", "other", "stdin"]
    plain = {"name": "", "source": ""}
    assert len({model.model_copy(update=plain).model_dump_json() for model in models}) == 1


def test_own_name_and_source_win(tmp_path: Path) -> None:
    path = write(tmp_path, "config.json", {**LLAMA, "name": "mine", "source": "my notes"})
    model = read_model(path)
    assert (model.name, model.source) == ("mine", "my notes")
    assert model.keys_ignored == ()


def test_a_path_wins_over_an_alias_and_a_catalogue_name_over_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("gpt2", "meta-llama/Llama-3.1-8B"):
        Path(folder).mkdir(parents=True)
        write(Path(folder), "config.json", LLAMA)
    assert read_model("gpt2").family == "gpt2"
    assert read_model("./gpt2").hidden == 64
    assert read_model("meta-llama/Llama-3.1-8B").hidden == 64


def test_architecture_stands_in_for_model_type(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert read_model(write(tmp_path, "c.json", config)).family == "llama"


def test_nested_text_config(tmp_path: Path) -> None:
    text = {**LLAMA, "tie_word_embeddings": True}
    wrapped = {"model_type": "wrapper", "text_config": text}
    assert read_model(write(tmp_path, "a.json", wrapped)).tied_embeddings
    with pytest.raises(UnknownModelError, match=r"'wrapper'.*vision tower"):
        read_model(write(tmp_path, "b.json", {**wrapped, "vision_config": {"depth": 2}}))


def test_misspelt_key_is_pointed_at(tmp_path: Path) -> None:
    config = {**LLAMA, "hiden_size": 64}
    del config["hidden_size"]
    with pytest.raises(InputError, match="config has no 'hidden_size'") as caught:
        read_model(write(tmp_path, "c.json", config))
    assert caught.value.hint == "the config has 'hiden_size': is that 'hidden_size' misspelt?"


@pytest.mark.parametrize(
    ("changes", "message", "nearest"),
    [
        ({"model_type": "lama"}, "no reader for model_type 'lama'", "llama"),
        ({"model_type": "qwen9", "use_sliding_window": False}, "'qwen9'", "qwen"),
        ({"model_type": "rwkv", "state_size": 64}, "state-space (Mamba) layers (state_size)", ""),
        ({"model_type": None, "architectures": ["XForCausalLM"]}, "architecture XForCausalLM", ""),
        ({"model_type": None, "architectures": None}, "without model_type and archit", "llama"),
        ({"model_type": 7}, "'7'", ""),
        ({"model_type": "x", "layer_types": ["odd"]}, "layers of type odd", ""),
    ],
)
def test_unknown_architecture_names_what_was_seen_and_the_nearest_family(
    changes: dict[str, Any], message: str, nearest: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownModelError) as caught:
        read_model(write(tmp_path, "c.json", {**LLAMA, "architectures": None, **changes}))
    assert caught.value.exit_code == 2
    assert message in caught.value.message
    assert f"nearest known family: {nearest}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("[1, 2]", "expected a mapping of keys to values, got a list"),
        ("hello", "expected a mapping of keys to values, got text"),
        ("42", "expected a mapping of keys to values, got a number"),
        ("{}", "not a model"),
        ("colour: red", "not a model"),
        ("\x00\x01", "not a text file"),
        ("a: [" * 10, "not valid"),
        ("a: " + "[" * 300_000, "nested more than 64 deep"),
        ("{x: " + "[" * 300_000, "nested more than 64 deep"),
        ('{"a": ' * 100_000, "nested more than 64 deep"),
        ("a: &a [1]\nb: [" + "*a, " * 17 + "]", "more than 16 YAML aliases"),
        ("format: megatron\nlayers: 2", "unknown format 'megatron'"),
        ("format: megatron_gpt\nlayer: 2", "unknown key 'layer'"),
        ("format: megatron_gpt\nlayers: 0\nhidden: 8\nheads: 2\nvocab: 9", "layers"),
        ("format: megatron_gpt\nlayers: 2\nhidden: 9\nheads: 2\nvocab: 9", "hidden = 9"),
        ("blocks: {}\nlayers: []", "hidden is missing"),
    ],
)
def test_text_that_is_no_model(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model("-", stdin=lambda: text)
    assert message in caught.value.message


def test_own_schema_refuses_runs_of_unknown_blocks_and_oversize() -> None:
    document: dict[str, Any] = {
        "hidden": 8, "vocab": 10, "tied_embeddings": True, "norm": "rms", "norm_bias": False,
        "blocks": {"a": {"mixer": None, "feed_forward": None}},
        "layers": [{"block": "a", "count": 1}],
    }  # fmt: skip

    def read(**changes: Any) -> None:
        read_model("-", stdin=lambda: json.dumps({**document, **changes}))

    read()
    with pytest.raises(InputError, match="block 'b', which is not in blocks"):
        read(layers=[{"block": "b", "count": 1}])
    with pytest.raises(InputError, match="hidden must be at most"):
        read(hidden=10**30)
    with pytest.raises(InputError, match="at most 10,000"):
        read(layers=[{"block": "a", "count": 10_001}])
    moe = {"kind": "moe", "experts": 2, "top_k": 3, "intermediate": 4}
    with pytest.raises(InputError, match="top_k = 3 is more than experts = 2"):
        read(blocks={"a": {"mixer": None, "feed_forward": moe}})


def test_garbage_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "garbage.json"
    path.write_bytes(bytes(range(128, 256)) * 80_000)
    start = time.perf_counter()
    with pytest.raises(InputError, match="larger than"):
        read_model(str(path))
    with pytest.raises(InputError, match="larger than"):
        read_model("-", stdin=lambda: "x" * 10_000_000)
    assert time.perf_counter() - start < 1.0
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match="not a text file"):
        read_model(str(path))


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("llama-3.1-9b", "no model named 'llama-3.1-9b'", "llama-3.1-8b"),
        ("nowhere/config.json", "no such file or folder", "catalog"),
        ("\0\1\2", "no model named", "catalog"),
        ("x" * 5000, "no model named", "catalog"),
        (" ", "the model is empty", "catalogue name"),
    ],
)
def test_references_that_name_nothing(reference: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model(reference)
    assert message in caught.value.message
    assert len(caught.value.message) < 300
    assert hint in str(caught.value.hint)


def test_a_json_file_is_held_to_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid JSON at line 1, column 9"):
        read_model(write(tmp_path, "c.json", '{"a": 1,}'))


def test_a_folder_without_config_and_stdin_without_reader(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        read_model(str(tmp_path))
    with pytest.raises(InputError, match="no standard input"):
        read_model("-")
