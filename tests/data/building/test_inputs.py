import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.data.building import inputs
from mmfree_jax.data.building.inputs import Documents, InputError, Reading, plan

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


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd, ".bz2": bz2.compress}


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_are_read_from_every_compression(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](LINES))
    assert read(file) == TEXTS
    file.write_bytes(COMPRESS[ending](LINES.replace(b"\n", b"\r\n\r\n")))
    assert read(file) == TEXTS


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst", ".bz2"])
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
        (b'{"text": null}', "field 'text' is not text but of type NoneType"),
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


def test_a_stray_byte_that_is_not_utf8_is_marked_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait" + b"." * 2000)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9 \\udc80 \xef\xbf\xbd", "other": "\xff"}\n' + LINES)
    documents = [Documents(unit, Reading()) for unit in plan([str(tmp_path)])]
    texts = [text for one in documents for text in one]
    assert texts[:2] == ["caf\ufffd au lait" + "." * 2000, "caf\ufffd \ufffd \ufffd"]
    assert [one.replaced for one in documents] == [1, 2]  # U+FFFD that the file holds is no loss


SPOILT = {  # of each kind of input: a document of other encoding among good ones
    "a.txt": "déjà vu et café".encode("latin-1"),
    "a.jsonl": LINES + b'{"text": "d\xe9j\xe0 vu"}\n' * 5,
    "a.jsonl.gz": gzip.compress(LINES + b'{"text": "d\xe9j\xe0 vu"}\n' * 5),
    "nul.txt": "as UTF-16 without a mark".encode("utf-16-le"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_of_another_encoding_is_refused_by_name_or_its_documents_are_left_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.txt").write_bytes(b"a good neighbour")
    (tmp_path / name).write_bytes(SPOILT[name])
    (tmp_path / "z.txt").write_bytes(b"another")
    with pytest.raises(InputError, match=rf"/{name} is not UTF-8: \d+ of \d+ characters"):
        read(tmp_path)
    documents = [Documents(unit, Reading(skip_bad=True)) for unit in plan([str(tmp_path)])]
    texts = [text for one in documents for text in one]
    assert texts == ["a good neighbour", *(TEXTS if "jsonl" in name else []), "another"]
    bad = [line for one in documents for line in one.bad]
    assert len(bad) == (5 if "jsonl" in name else 1)
    assert all(name in line and "characters are not UTF-8" in line for line in bad)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-be"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_byte_order_mark_is_believed(
    tmp_path: Path, encoding: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_BYTES", 100)  # were they cut into units, it would show
    monkeypatch.setattr(inputs, "LARGE_TEXT", 100)
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending]((mark + LINES.decode()).encode(encoding)))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending]((mark + "naïve 数学 🙂\n" * 200).encode(encoding)))
    found = read(tmp_path)
    assert found[: len(TEXTS)] == TEXTS
    assert "\n".join(found[len(TEXTS) :]) == "\n".join(["naïve 数学 🙂"] * 200)


def test_utf16_that_is_cut_off_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("cut".encode("utf-16")[:-1])
    with pytest.raises(InputError, match=r"a\.txt is cut off or damaged"):
        read(tmp_path)


SHARDS = ("jsonl", "parquet", "large", "gz")


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("empty", [".txt", ".md", ".jsonl"])
@pytest.mark.parametrize("place", ["0", "1", "2"])
def test_an_empty_file_changes_nothing_wherever_it_stands(
    tmp_path: Path, kind: str, empty: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`place`: before, between and after two shards."""
    monkeypatch.setattr(inputs, "LARGE_TEXT", 100)
    for name in ("05", "15"):
        if kind == "parquet":
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / f"{name}.parquet")
        elif kind == "large":
            (tmp_path / f"{name}.txt").write_text(f"{name} a large text\n" * 20)
        else:
            data = LINES if kind == "jsonl" else gzip.compress(LINES)
            (tmp_path / (f"{name}.jsonl" + ".gz" * (kind == "gz"))).write_bytes(data)
    before = [text for text in read(tmp_path) if text]
    (tmp_path / f"{place}{empty}").touch()
    (tmp_path / f"{place}+{empty}").touch()
    assert [text for text in read(tmp_path) if text] == before


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst", ".bz2"])
def test_a_compressed_file_without_a_byte_is_cut_off(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").touch()
    with pytest.raises(InputError, match=rf"a\.txt{ending} is cut off"):
        read(tmp_path)
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](b""))
    assert read(tmp_path) == [""]


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


def test_parquet_text_may_be_bytes_or_a_dictionary(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kinds = (pyarrow.binary(), pyarrow.large_binary(), pyarrow.large_string(), pyarrow.string_view())
    kinds += (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),)
    for kind in kinds:
        stored = [text.encode() for text in TEXTS] if "binary" in str(kind) else TEXTS
        parquet.write_table(pyarrow.table({"text": pyarrow.array(stored, kind)}), tmp_path / "a.parquet")
        assert read(tmp_path) == TEXTS, kind


@pytest.mark.parametrize(("values", "kind"), [([["a", "b"], ["c"]], "list"), ([1, 2], "int64"), ([True, None], "bool")])
def test_parquet_columns_that_hold_no_text_are_named(tmp_path: Path, values: list, kind: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [None, *values]}), file, row_group_size=1)
    with pytest.raises(InputError, match=rf"a\.parquet, row 1: column 'text' holds {kind}.*, which is not text"):
        read(file)
    every = [Documents(unit, Reading(skip_bad=True)) for unit in plan([str(file)])]
    assert [text for one in every for text in one] == []
    assert sum(len(one.bad) for one in every) == sum(value is not None for value in values)


def test_parquet_bytes_of_another_encoding_are_bad_records(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["good", "d\u00e9j\u00e0".encode("latin-1"), "more"], pyarrow.binary())
    for kind in (column, pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())):  # strings, not checked
        parquet.write_table(pyarrow.table({"text": kind}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet is not UTF-8: 2 of 12 characters"):
            read(tmp_path)
        documents = Documents(plan([str(tmp_path)])[0], Reading(skip_bad=True))
        assert list(documents) == ["good", "more"]
        assert "row 1: 2 of 4 characters" in documents.bad[0]


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    names = (
        "a.jsonl",
        "._a.jsonl",
        "__MACOSX/a.jsonl",
        ".git/notes.txt",
        "b.json.gz",
        "info.json",
        "c.csv",
        "d.tar.gz",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    said: list[str] = []
    units = plan([str(tmp_path)], said.append)
    assert [Path(unit.files[0]).name for unit in units] == ["a.jsonl", "b.json.gz"]
    assert said == [f"{tmp_path}: left out 6 files: hidden (3), .csv (1), .tar.gz (1), .json (1)"]
    assert [text for unit in units for text in Documents(unit, Reading())] == 2 * TEXTS
    assert read(tmp_path / "info.json") == TEXTS  # named, it is read
    assert read(tmp_path / ".git") == [LINES.decode()[:-1]]  # and so is a hidden folder


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
    with pytest.raises(ConfigError, match=r"Parquet needs a package that is not installed .*: pip install pyarrow"):
        plan([str(tmp_path / "b.parquet")])
