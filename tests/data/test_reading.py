from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.core.errors import DataError, MissingError
from lorica.data.reading import fingerprint, parse_rows, read_bytes, read_rows

ROWS = [{"text": "one"}, {"text": "two ☂"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), min_size=1, max_size=6),
    raw=st.booleans(),
)
def test_rows_written_line_by_line_or_as_an_array_are_read_back(rows: list[dict[str, Any]], raw: bool) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=raw) for row in rows)
    assert parse_rows(lines.encode("utf-8", "surrogatepass"), "x.jsonl") == rows
    assert parse_rows(json.dumps(rows).encode(), "x.json") == rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + "\n",
        "\ufeff" + LINES,
        LINES.replace("\n", "\r\n"),
        "\n\n" + LINES.replace("\n", "\n \n\n") + "\n\n",
    ],
    ids=["plain", "final newline", "byte order mark", "windows line ends", "blank lines"],
)
def test_harmless_variations_of_a_file_change_nothing(content: str, suffix: str) -> None:
    assert parse_rows(content.encode(), f"x.{suffix}") == ROWS


def test_blank_lines_do_not_shift_the_line_numbers() -> None:
    rows = parse_rows(b'\n{"text": "a"}\n\n\n{"text": "b"}\n', "x.jsonl")
    assert [rows.where(0), rows.where(1)] == ["x.jsonl, line 2", "x.jsonl, line 5"]


def test_unicode_line_separators_inside_a_string_do_not_end_the_line() -> None:
    row = {"text": "a\u2028b\u0085c"}
    assert parse_rows(json.dumps(row, ensure_ascii=False).encode(), "x.jsonl") == [row]


def test_one_object_over_several_lines_is_one_row() -> None:
    assert parse_rows(json.dumps(ROWS[0], indent=2).encode(), "x.json") == [ROWS[0]]


def test_plain_text_gives_one_row_for_each_paragraph_with_its_line() -> None:
    rows = parse_rows(b"\r\nOne\r\nmore\r\n\r\n \t\r\n\r\nTwo\r\n\nThree", "x.txt")
    assert [row["text"] for row in rows] == ["One\nmore", "Two", "Three"]
    assert [rows.places[i] for i in range(3)] == [2, 7, 9]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    rows = read_rows(path)
    assert rows == ROWS
    assert rows.where(1) == f"{path}, row 2"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "x.jsonl", "x.jsonl is empty"),
        (b"\n \n", "x.jsonl", "x.jsonl holds no rows"),
        (b"[]", "x.json", "x.json holds no rows"),
        (b" \n\n ", "x.txt", "x.txt holds no rows"),
        (b'{"text": "a"}\n{"text": "b', "x.jsonl", r"x.jsonl, line 2 is not valid JSON: .*cut short"),
        (b'{"text": "a"}\n{"text": ', "x.jsonl", r"x.jsonl, line 2 is not valid JSON: .*cut short"),
        (b"{'text': 'a'}\n", "x.jsonl", r"x.jsonl, line 1 is not valid JSON: .*column 2\.$"),
        (b'{"text": "a"} {"text": "b"}\n', "x.jsonl", "line 1 is not valid JSON: Extra data"),
        (b'[{"text": "a"},\n{"text": }]', "x.json", "x.json, line 2 is not valid JSON"),
        (b'{"text": "a"}\n"b"\n', "x.jsonl", "line 2 holds a text where an object"),
        (b'{"text": "a"}\n[1]\n', "x.jsonl", "line 2 holds a list where an object"),
        (b'{"text": "a"}\nnull\n', "x.jsonl", r"line 2 holds nothing \(null\) where an object"),
        (b'[{"text": "a"}, 3]', "x.json", "item 2 holds a number where an object"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', "x.jsonl", r"line 2 is not UTF-8 text \(byte 0xe9\)"),
        (b'{"text": ' + b"[" * 100_000, "x.jsonl", "line 1 is not usable JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "x.jsonl", "line 1 is not usable JSON"),
        (b"PAR1 this is no parquet file", "x.parquet", "x.parquet is not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_that_names_the_place(content: bytes, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        parse_rows(content, name)
    assert "\n" not in str(caught.value)


def test_utf_16_is_refused_with_the_command_that_converts_it() -> None:
    with pytest.raises(DataError, match="not UTF-8") as caught:
        parse_rows(LINES.encode("utf-16"), "x.jsonl")
    assert "iconv" in str(caught.value.hint)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_parquet_file_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": str(i) * 50} for i in range(200)]), path)
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"x\.parquet is (empty|not a readable parquet file; it may be cut short)"):
        parse_rows(content[: int(len(content) * share)], "x.parquet")


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES)
    with pytest.raises(MissingError, match=r"no data file .*tran\.jsonl\. Did you mean 'train\.jsonl'"):
        read_bytes(tmp_path / "tran.jsonl")
    with pytest.raises(MissingError, match="no data file"):
        read_bytes(tmp_path / "absent" / "x.jsonl")


def test_a_name_of_another_format_lists_the_accepted_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl, \.ndjson, \.json, \.parquet, \.txt"):
        read_bytes(tmp_path / "x.csv")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "x.jsonl")


def test_the_fingerprint_follows_the_bytes() -> None:
    assert fingerprint(b"a") == fingerprint(b"a") != fingerprint(b"b")
    assert len(fingerprint(b"")) == 16
