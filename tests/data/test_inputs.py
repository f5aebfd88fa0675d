import gzip
import json
import lzma
from pathlib import Path

import pytest

from mmfree_jax.data import inputs
from mmfree_jax.data.inputs import Documents, InputError, Reading, plan

TEXTS = ["one", "two\nlines\r\n", "naïve 数学 🙂", "", 'quotes " and \\ and \u2028', "x" * 5000]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read(*names: Path | str, **reading: object) -> list[str]:
    units = plan([str(name) for name in names])
    return [text for unit in units for text in Documents(unit, Reading(**reading))]  # type: ignore[arg-type]


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames in one file, as `cat a.zst b.zst` gives
    compressor = zstandard.ZstdCompressor(write_checksum=True)  # as the zstd command writes by default
    return compressor.compress(data[:half]) + compressor.compress(data[half:])


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_are_read_from_every_compression(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](LINES))
    assert read(file) == TEXTS
    file.write_bytes(COMPRESS[ending](LINES.replace(b"\n", b"\r\n\r\n")))
    assert read(file) == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_truncated_or_damaged_file_is_named(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending](b"".join(json.dumps({"text": str(i**5)}).encode() + b"\n" for i in range(9999)))
    for broken in (whole[:-9], whole[: len(whole) // 2], whole[:3000] + bytes(200) + whole[3200:]):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=rf"a\.jsonl{ending} is cut off or damaged after \d+ bytes"):
            read(file, skip_bad=True)


def test_slices_of_a_large_file_give_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    texts = [f"document {i} " + "y" * (i % 37) for i in range(500)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for size in (1000, 77, 50):
        monkeypatch.setattr(inputs, "UNIT_BYTES", size)
        assert len(plan([str(file)])) >= file.stat().st_size // size
        assert read(file) == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "Unterminated string"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"body": "x"}', "no field 'text', only 'body'"),
        (b'{"text": null}', "field 'text' is not text"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_fatal_and_named_or_skipped_as_asked(tmp_path: Path, line: bytes, reason: str) -> None:
    for name, data in (("a.jsonl", LINES + line + b"\n" + LINES), ("b.jsonl.gz", gzip.compress(LINES + line))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}, line 7: .*{reason}"):
            read(tmp_path / name)
        documents = Documents(plan([str(tmp_path / name)])[0], Reading(skip_bad=True))
        assert list(documents)[:6] == TEXTS
        assert len(documents.bad) == 1
        assert f"{name}, line 7" in documents.bad[0]


def test_the_line_number_is_right_in_every_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' * 40 + b"bad\n" + b'{"text": "good"}\n' * 40)
    with pytest.raises(InputError, match="line 41"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_record_too_long_to_hold_is_a_bad_one(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LONGEST_RECORD", 100_000)
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1_000_000)
    long = json.dumps({"text": "long " * 700_000}).encode() + b"\n"
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](LINES + long + LINES + long + LINES))
    with pytest.raises(InputError, match=r", line 7: a record of 4 MB, more than 0 MB: .*text file"):
        read(file)
    every = [Documents(unit, Reading(skip_bad=True)) for unit in plan([str(file)])]
    assert [text for documents in every for text in documents] == 3 * TEXTS
    assert [bad.split(":")[0] for documents in every for bad in documents.bad] == [
        f"{file}, line 7",
        f"{file}, line 14",
    ]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("space", ["", " "])
def test_one_endless_line_is_cut_between_words_or_characters(
    tmp_path: Path, space: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 1_000_000)
    words = [f"Wörter数学🙂{i}{space}" for i in range(200_000)]
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending]("".join(words).encode()))
    found = read(tmp_path / f"a.txt{ending}")
    assert "".join(found) == "".join(words)
    assert max(len(text.encode()) for text in found) <= 3 * inputs.PART_BYTES
    assert len(found) > 20
    if space:
        assert all(text.endswith(" ") for text in found)


def test_invalid_utf8_is_marked_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert read(tmp_path) == ["caf\ufffd au lait", "caf\ufffd"]


def test_folders_are_read_in_order_and_small_files_share_a_unit(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.md", "a/skip.png", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"compressed"))
    assert read(tmp_path) == ["a/1.md", "b/2.txt", "c.txt", "compressed"]
    assert len(plan([str(tmp_path)])) == 1


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "n": list(range(7))}), file, row_group_size=2)
    assert read(file) == TEXTS
    with pytest.raises(InputError, match=r"a\.parquet has no column 'body', only text, n"):
        read(file, key="body")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"a\.parquet is cut off or damaged"):
        read(file)


def test_array_records_hold_text_or_json(tmp_path: Path) -> None:
    module = pytest.importorskip("array_record.python.array_record_module")
    file = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(file), "group_size:1")
    for record in (b"plain text", json.dumps({"text": "from json"}).encode(), "naïve".encode()):
        writer.write(record)
    writer.close()
    assert read(file) == ["plain text", "from json", "naïve"]


def test_hugging_face_datasets_are_streamed_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, on datasets in local folders: Parquet, and JSON lines with a named configuration."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"row {i}: naïve 数学" for i in range(9)]
    columns, lines = tmp_path / "columns", tmp_path / "lines"
    (lines / "en").mkdir(parents=True)
    columns.mkdir()
    (lines / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/*\n---\n")
    (lines / "de.jsonl").write_text('{"body": "not asked for"}\n')
    for shard in range(3):
        mine = texts[3 * shard : 3 * shard + 3]
        parquet.write_table(pyarrow.table({"body": mine, "n": [1, 2, 3]}), columns / f"train-{shard}.parquet")
        (lines / f"en/{shard}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in mine))
    for name in (f"hf:{columns}", f"hf:{lines}:en"):
        assert len(plan([name])) == 3
        assert read(name, key="body") == texts
    with pytest.raises(InputError, match=r":en, shard 0, row 0: no field 'text', only 'body'"):
        read(f"hf:{lines}:en")


def test_what_cannot_be_read_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.docx has an unknown ending: use \.txt"):
        plan([str(tmp_path / "a.docx")])
    with pytest.raises(InputError, match="holds no file that can be read"):
        plan([str(tmp_path)])
    with pytest.raises(InputError, match="nothing does not exist"):
        plan([str(tmp_path / "nothing")])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="Parquet needs the package pyarrow: pip install pyarrow"):
        plan([str(tmp_path / "b.parquet")])
