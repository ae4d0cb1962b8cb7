"""JSON as people edit it, and numbers as files write them: the value, or ValueError in a few words."""

import pytest

from ctclip.fileio import MOST_NESTED, parse_json, read_json
from ctclip.formatting import parse_number


@pytest.mark.parametrize("content", [b'{"a": [1, {"b": null}]}', b'\xef\xbb\xbf{"a": [1, {"b": null}]}'])
def test_json_with_and_without_a_byte_order_mark(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff", '{"a": 1}'.encode("utf-16"), b"[" * 200_000, b'{"a":' * 200_000, b"[" * 900 + b"]" * 900,
    b'{"a":' * (MOST_NESTED + 1) + b"1" + b"}" * (MOST_NESTED + 1), b"1" * 5000, b"[1] 2",
])  # fmt: skip
def test_what_is_no_json_is_said_in_a_few_words(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_key_that_is_there_twice_is_named():
    assert parse_json('{"a": {"b": 1}, "c": {"b": 2}}') == {"a": {"b": 1}, "c": {"b": 2}}
    for text in ('{"b": 1, "a": 2, "b": 1}', '[{"c": {"b": 1, "b": 2}}]'):
        with pytest.raises(ValueError, match="the key 'b' twice"):
            parse_json(text)


def test_no_json_file_is_nested_as_deep_as_is_refused():
    nested: object = 1
    for _ in range(MOST_NESTED - 1):
        nested = {"a": nested}
    assert parse_json(str(nested).replace("'", '"')) == nested


@pytest.mark.parametrize("text, value", [("1", 1), (" -0.5 ", -0.5), ("+1e3", 1000), (".5", 0.5), ("7.", 7)])
def test_decimal_numbers(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", " ", "nan", "inf", "-Infinity", "1e999", "1_0", "١٢", "１", "0x10", "1,5", "1 2"])
def test_what_python_takes_for_a_number_and_files_do_not(text):
    with pytest.raises(ValueError):
        parse_number(text)
