import gzip
import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

import launch
from mmfree_jax.data.building import tiers
from mmfree_jax.data.building.distributions import TIERS, Source, members, version_of
from mmfree_jax.data.building.extraction import from_sword, is_prose, paragraphs_of
from mmfree_jax.data.building.workers import WorkerError
from mmfree_jax.data.reading.token_set import TokenSet
from tests.data.made_up import passage

SENTENCE = "This is what the program does with the file that is given to it, and it is not an error when there is none."
OTHER = "When the option is used, all of the values are read from the input before any of them is written to a file."

FILES = {
    "a/index.html": f"<html><head><title>{OTHER}</title></head><body><nav>{OTHER}</nav><p>{SENTENCE}</p>"
    f"<!-- {OTHER} --><pre>{OTHER}</pre><ul><li>It&#39;s <b>so</b>: {OTHER}</li></ul></body></html>",
    "a/guide.rst": f"Title\n=====\n\n.. note:: {OTHER}\n\n{SENTENCE}"
    f"\n\n    x = literal(1)\n\nSee :func:`name <x.name>`: {OTHER}",
    "a/readme.txt": f"{SENTENCE[:48]}\n{SENTENCE[49:]}\n\n  * {OTHER}",
    "usr/share/man/man1/tool.1": f".TH TOOL 1\n.SH NAME\n{SENTENCE}\n"
    f'.PP\n.nf\n{OTHER}\n.fi\n\\fBIt\\fP is: {OTHER}\n.\\" {OTHER}',
    "a/doc.texi": f"@node Top\n@chapter Top\n{SENTENCE}\n\n@item @code{{it}} is: {OTHER}\n@end",
    "a/doc.pod": f"=head1 NAME\n\n{SENTENCE}\n\n  {OTHER}\n\nB<It> is: {OTHER}\n\n=cut\n\n{OTHER.upper()}",
    "botocore/data/x/service-2.json": json.dumps(
        {"documentation": f"<p>{SENTENCE}</p>", "a": [{"documentation": f"It is: {OTHER}"}]}
    ),
}
COMMENTED = {
    "k/main.c": f"/* SPDX {OTHER} */\nint x; /*\n * {SENTENCE}\n */\n// It is: {OTHER[:35]}\n// {OTHER[36:]}\n",
    "k/unit.ads": f"--  {SENTENCE}\nprocedure X;\n--  It is: {OTHER}\n",
    "k/Kconfig": f"config X\n\tbool\n\thelp\n\t  {SENTENCE}\n\n\t  It is: {OTHER}\n\nconfig Y\n\tbool\n",
    "k/ChangeLog": f"2001-01-01  Name\n\n\t* {SENTENCE}\n\n\t* It is: {OTHER}\n",
}


@pytest.mark.parametrize("name", [*FILES, *COMMENTED])
def test_prose_is_taken_out_of_every_kind_of_file(name: str) -> None:
    data = (FILES | COMMENTED)[name].encode()
    found = paragraphs_of(f"/{name}", data, comments=name in COMMENTED)
    assert found[0] == SENTENCE
    assert len(found) == 2
    assert found[1].endswith(OTHER)
    assert paragraphs_of(f"/{name}.gz", gzip.compress(data), comments=name in COMMENTED) == found


def test_source_code_and_unknown_files_give_nothing_unasked() -> None:
    assert all(paragraphs_of(f"/{name}", text.encode()) == [] for name, text in COMMENTED.items())
    assert paragraphs_of("/a/picture.png", b"\x89PNG") == []


def test_prose_is_told_from_code_and_lists() -> None:
    assert is_prose(SENTENCE)
    assert not is_prose("short and to the point")
    assert not is_prose("int main(int argc, char **argv) { return run(argc, argv, &options, NULL, 0, 0, 0, 1, 2, 3); }")
    assert not is_prose(
        "apple banana cherry date elderberry fig grape honeydew kiwi lemon mango nectarine orange papaya"
    )
    assert not is_prose(
        "std::vector of my_type_t in the my_namespace_x and the other_name_y of a_b is for c_d and e_f it is"
    )


def test_long_paragraphs_are_cut_at_sentences() -> None:
    found = paragraphs_of("/a.txt", " ".join([SENTENCE, OTHER] * 100).encode())
    assert " ".join(found) == " ".join([SENTENCE, OTHER] * 100)
    assert all(1_000 < len(part) < 2_000 for part in found[:-1])


def test_sword_modules_are_read_block_by_block() -> None:
    blocks = [f"<verse>{SENTENCE}</verse><w>{OTHER}</w>".encode(), OTHER.encode()]
    packed = [zlib.compress(block) for block in blocks]
    index = struct.pack("<III", 0, len(packed[0]), 0) + struct.pack("<III", len(packed[0]), len(packed[1]), 0)
    index += struct.pack("<III", 0, 0, 0)
    found = dict(from_sword({"x/nt.bzs": index, "x/nt.bzz": b"".join(packed)}))
    assert found == {"x/nt.bzs#0": [SENTENCE, OTHER], "x/nt.bzs#1": [OTHER]}


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def deb_of(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    control = f"Package: {package}\nVersion: 1:2.5-3\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    for name, data in {**files, "DEBIAN/control": control.encode()}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    archive = folder / f"{package}_1%3a2.5-3_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(archive)], check=True, capture_output=True)
    shutil.rmtree(root)
    return archive


needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed")


@needs_dpkg
def test_members_of_every_archive_are_read_without_unpacking(tmp_path: Path) -> None:
    inner = tar_of({"src/a.c": b"A", "src/b.h": b"B"}, "w:xz")
    deb = deb_of(tmp_path, "x-src", {"usr/src/x.tar.xz": inner, "usr/share/doc/y.txt": b"Y"})
    assert dict(members(deb)) == {"src/a.c": b"A", "src/b.h": b"B", "usr/share/doc/y.txt": b"Y"}
    assert version_of(deb) == "1:2.5-3"
    (tmp_path / "pkg-1.2.tgz").write_bytes(tar_of({"package/a": b"A"}, "w:gz"))
    assert dict(members(tmp_path / "pkg-1.2.tgz")) == {"package/a": b"A"}
    with zipfile.ZipFile(tmp_path / "pkg-1.2.post1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg/a.txt", "A")
    assert dict(members(tmp_path / "pkg-1.2.post1-py3-none-any.whl")) == {"pkg/a.txt": b"A"}
    assert version_of(tmp_path / "pkg-1.2.post1-py3-none-any.whl") == "1.2.post1"
    assert version_of(tmp_path / "pkg-1.2.tgz") == "1.2"
    deb.write_bytes(deb.read_bytes()[:-100])
    with pytest.raises((RuntimeError, tarfile.ReadError, EOFError)):
        list(members(deb))


def fake_client(folder: Path, archives: Path) -> None:
    """An `apt-get` that takes packages from a folder and keeps a list of what was asked for."""
    folder.mkdir()
    script = f"""#!/bin/sh
echo "$3" >> {archives}/asked
cp {archives}/"$3"_* . || {{ echo "E: Unable to locate package $3" >&2; exit 100; }}
"""
    (folder / "apt-get").write_text(script)
    (folder / "apt-get").chmod(0o755)


@needs_dpkg
def test_a_tier_is_built_resumed_and_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    page = lambda: "\n\n".join(passage(rng, 3) for _ in range(12)).encode()
    first = {f"usr/share/doc/one/{i:02d}.txt": page() for i in range(40)}
    second = {f"usr/share/doc/two/{i:02d}.txt": page() for i in range(40)} | {
        "usr/share/doc/two/copy.txt": first["usr/share/doc/one/00.txt"]
    }
    archives = tmp_path / "archives"
    archives.mkdir()
    fake_client(tmp_path / "bin", archives)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    sources = (Source("apt", "one", "MIT"), Source("apt", "two", "GPL-2.0"))
    monkeypatch.setitem(TIERS, "s", sources)
    deb_of(archives, "one", first)
    with pytest.raises(WorkerError, match=r"two failed: E: Unable to locate package two .*apt-get update"):
        tiers.build_tier("s", tmp_path / "set", 300, processes=1, progress=lambda _: None)
    deb_of(archives, "two", {"usr/share/doc/two/picture.png": b"PNG"})
    assert launch.main(["corpus", "build", "s", "--out", str(tmp_path / "set")]) == 1
    assert "two_1%3a2.5-3_all.deb holds no prose that can be read" in capsys.readouterr().err
    deb_of(archives, "two", second)
    (tmp_path / ".set.packages" / ".fetching-killed").mkdir()
    assert launch.main(["corpus", "build", "s", "--out", str(tmp_path / "set"), "--tokenizer", "bytes"]) == 0
    built = TokenSet.open(tmp_path / "set")
    assert built.vocab_size == 257
    built.verify()
    assert (archives / "asked").read_text().split() == [
        "one",
        "two",
        "two",
        "two",
    ]  # what was there was not fetched again
    assert [(s["source"], s["version"], s["licence"]) for s in built.card["sources"]] == [
        ("one", "1:2.5-3", "MIT"),
        ("two", "1:2.5-3", "GPL-2.0"),
    ]
    left = built.card["sources"][1]["bytes_after"]
    assert left["read"] - left["exact"] >= 0.9 * left["read"] / 41  # the copy of a page of package one is gone
    assert built.split("valid").documents >= 1
    assert not list(tmp_path.glob(".set*"))


def test_a_missing_program_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main(["corpus", "build", "l", "--out", str(tmp_path / "set")]) == 1
    assert "not installed: apt-get, dpkg-deb, npm, pdftotext" in capsys.readouterr().err


def test_the_tiers_name_every_package_once_with_a_licence() -> None:
    for sources in TIERS.values():
        names = [source.package for source in sources]
        assert len(names) == len(set(names))
        assert all(source.licence and source.client in ("apt", "pip", "npm") for source in sources)
    assert set(TIERS["s"]) | set(TIERS["m"]) <= set(TIERS["l"])
