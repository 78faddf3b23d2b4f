"""The record file: whole lines, nothing twice, a torn end, one writer."""

import json
from dataclasses import replace

import pytest

from diffmas.evaluation.records import Record, RecordFile, read_records
from diffmas.support.atomic import write_atomically

ONE = Record(
    "relay", "single", "matched", 0, 0, 0, "Recall B", "12\n\u2028", "12", "12", True, 2, 0, 0, 9, [0.5, 0.25], -0.7,
    "stop", 0.01,
)  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "items.jsonl"
    records = [replace(ONE, index=i) for i in range(3)]
    with RecordFile(path) as file:
        file.append(records[:2])
        file.append(records[1:])
        assert file.records == records
    assert read_records(path) == records and len(path.read_text().strip().split("\n")) == 3


@pytest.mark.parametrize("cut", [1, 20, -2, -1])
def test_a_torn_last_line_is_cut_and_written_again(tmp_path, cut):
    path = tmp_path / "items.jsonl"
    with RecordFile(path) as file:
        file.append([ONE, replace(ONE, sample=1)])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    assert read_records(path) == [ONE]
    with RecordFile(path) as file:
        assert file.records == [ONE]
        file.append([ONE, replace(ONE, sample=1)])
    assert path.read_bytes() == first + second


def test_a_record_written_twice_counts_once(tmp_path):
    path = tmp_path / "items.jsonl"
    with RecordFile(path) as file:
        file.append([ONE])
    path.write_bytes(path.read_bytes() * 2)
    assert read_records(path) == [ONE]


def test_one_writer_at_a_time(tmp_path):
    with RecordFile(tmp_path / "items.jsonl"), pytest.raises(BlockingIOError, match="another process"):
        RecordFile(tmp_path / "items.jsonl")
    RecordFile(tmp_path / "items.jsonl").close()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"task": "relay"}\n{}\n')
    with pytest.raises(ValueError, match="line 1 is no record"):
        RecordFile(path)


def test_no_file_no_records(tmp_path):
    assert read_records(tmp_path / "items.jsonl") == []


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "summary.json"
    write_atomically(path, json.dumps({"a": 1}))
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half\ud800")
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    write_atomically(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o400
