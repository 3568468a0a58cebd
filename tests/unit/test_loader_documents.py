"""Documents that cannot be read say where and why, and how to mend it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from hardware_profiles.documents import (
    MAX_BYTES,
    DocumentError,
    decode,
    parse_document,
    read_document,
    validate,
)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["inner"] = "inner"
    width: int = Field(ge=1)


class Other(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["other"] = "other"
    depth: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    nodes: int = Field(ge=1)
    mode: Literal["fast", "slow"] = "fast"
    parts: tuple[Inner, ...] = ()
    tagged: Inner | Other | None = Field(default=None, discriminator="kind")


GOOD = {"name": "a", "nodes": 2}


def _error(data: object) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        validate(Outer, data, where="f.yaml")
    return caught.value


def test_yaml_and_json_are_read() -> None:
    assert parse_document("a: 1\nb: [x, 2.5e-6]", where="w") == {"a": 1, "b": ["x", 2.5e-6]}
    assert parse_document('{"a": [1, null]}', where="w") == {"a": [1, None]}
    assert parse_document("{a: 1}", where="w") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "w: empty"),
        (" \n\t ", "w: empty"),
        ("a: 1\nb: [1, 2", "line 3, column 1"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a: 1\na: 2", "key 'a' is written twice"),
        ("a\x00b", "not a text file"),
        ("? [a]\n: 1", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_text(text: str, says: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_document(text, where="w")
    assert says in caught.value.message


def test_bad_json_names_line_and_column() -> None:
    with pytest.raises(DocumentError, match=r"line 2, column 6"):
        parse_document('{"a": 1,\n "b" 2}', where="config.json")


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    for text in ("[" * 50_000, "[" * 5_000 + "]" * 5_000):
        with pytest.raises(DocumentError):
            parse_document(text, where="w")


def test_large_and_binary_input_is_refused_quickly() -> None:
    start = time.process_time()
    with pytest.raises(DocumentError, match="larger than 8 MiB"):
        parse_document("x" * (MAX_BYTES + 1), where="w")
    with pytest.raises(DocumentError, match="not UTF-8"):
        decode(bytes(range(256)) * 30_000, where="w")
    assert time.process_time() - start < 1.0


def test_files(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such file"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(DocumentError, match="is a folder"):
        read_document(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_document(tmp_path / "a.yaml") == {"a": 1}


def test_unknown_key_gets_a_suggestion() -> None:
    error = _error({**GOOD, "noeds": 3})
    assert error.message == "f.yaml: unknown key 'noeds'"
    assert error.hint == "did you mean 'nodes'?"


def test_unknown_key_inside_a_list_and_a_union() -> None:
    error = _error({**GOOD, "parts": [{"width": 1}, {"width": 1, "widht": 2}]})
    assert error.message == "f.yaml: unknown key 'widht' in parts[1]"
    assert error.hint == "did you mean 'width'?"
    error = _error({**GOOD, "tagged": {"kind": "other", "dept": 2}})
    assert error.message == "f.yaml: unknown key 'dept' in tagged"
    assert error.hint == "did you mean 'depth'?"


def test_value_out_of_range_names_field_value_and_rule() -> None:
    assert _error({**GOOD, "nodes": 0}).message == (
        "f.yaml: nodes: must be greater than or equal to 1, got 0"
    )
    assert _error({**GOOD, "tagged": {"kind": "inner", "width": -4}}).message == (
        "f.yaml: tagged.width: must be greater than or equal to 1, got -4"
    )
    error = _error({**GOOD, "mode": "fats"})
    assert "mode: must be 'fast' or 'slow', got 'fats'" in error.message
    assert error.hint == "did you mean 'fast'?"


def test_missing_and_wrong_type() -> None:
    assert _error({"name": "a"}).message == "f.yaml: nodes is missing"
    assert (
        "expected a mapping with keys such as name, nodes, got a list of 1" in _error([1]).message
    )
    assert "got 'abc'" in _error("abc").message


def test_the_first_three_of_several_problems_are_listed() -> None:
    error = _error({"nodes": 0, "mode": "x", "noeds": 1, "nmae": 2})
    assert error.message.splitlines()[0] == "f.yaml: 5 problems"
    assert error.message.splitlines()[-1] == "  and 2 more"
    assert len(error.message.splitlines()) == 5


@pytest.mark.parametrize("text", ["a: " + "[" * 500_000, "- " * 500_000 + "x"])
def test_deep_nesting_is_refused_before_the_parser_sees_it(text: str) -> None:
    with pytest.raises(DocumentError, match="nested more than 64 deep"):
        parse_document(text, where="x")
