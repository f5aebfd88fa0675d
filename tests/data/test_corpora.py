import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data import corpora
from mmfree_jax.data.building import embedded
from mmfree_jax.data.reading.token_set import TokenSet
from tests.data.building.test_dedup import jaccard, word_runs
from tests.data.made_up import ROOT, made_up_packages, run_python

BUILD = """if True:
    import os
    import sys
    from pathlib import Path
    from tests.data.made_up import made_up_packages
    from mmfree_jax.data import corpora
    from mmfree_jax.data.building import embedded
    packages = made_up_packages(Path(sys.argv[1]))
    embedded.installed_packages = lambda: packages
    embedded.installed_versions = lambda: {p.name: p.version for p in packages}
    os.environ["MMFREE_JAX_CACHE"] = sys.argv[2]
    built = corpora.resolve_corpus("embedded", 500, lambda line: print(line, flush=True))
    print(built.fingerprint, built.path)
"""


def digest(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    folder = tmp_path_factory.mktemp("corpus")
    return embedded.build_embedded(folder / "set", 500, packages=made_up_packages(folder), processes=1)


def test_two_processes_build_the_same_bytes(built: TokenSet, tmp_path: Path) -> None:
    for seed in ("1", "77"):
        run_python(BUILD, str(tmp_path / "sources"), str(tmp_path / seed), PYTHONHASHSEED=seed)
    folders = [next((tmp_path / seed).glob("embedded-*[0-9a-f]/")) for seed in ("1", "77")]
    assert digest(folders[0]) == digest(folders[1]) == digest(built.path)


def test_training_and_held_out_text_share_no_document_and_no_long_run(built: TokenSet) -> None:
    tokenizer = built.tokenizer()
    texts: dict[str, list[str]] = {}
    for name, split in built.splits.items():
        edges = [*split.document_starts().tolist(), len(split)]
        texts[name] = [tokenizer.decode(split[a:b]) for a, b in pairwise(edges)]
    assert len(texts["valid"]) >= 3
    held = set().union(*(word_runs(text, 8) for text in texts["valid"]))
    for text in texts["train"]:
        for passage in text.split("\n\n"):
            assert len(word_runs(passage, 8) & held) <= 0.25 * len(word_runs(passage, 8))
    assert max(jaccard(a, b) for a in texts["train"][::4] for b in texts["valid"]) < 0.5


def test_the_card_accounts_for_every_byte(built: TokenSet) -> None:
    card = built.card
    for source in card["sources"]:
        left = list(source["bytes_after"].values())
        assert left == sorted(left, reverse=True)
        assert (source["version"], source["licence"]) == ("1.0", "MIT")
    joined = sum(built.text_bytes(split) for split in ("train", "valid"))
    assert sum(source["documents"] for source in card["sources"]) == sum(s.documents for s in built.splits.values())
    kept = sum(source["bytes_after"]["protected"] for source in card["sources"])
    assert kept <= joined <= 1.01 * kept  # blank lines between passages
    assert card["fingerprint"] == built.fingerprint
    assert "| alpha | 1.0 | MIT |" in (built.path / "data_card.md").read_text()


def test_a_second_call_opens_what_the_first_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = made_up_packages(tmp_path)
    monkeypatch.setattr(embedded, "installed_packages", lambda: packages)
    monkeypatch.setattr(embedded, "installed_versions", lambda: {"alpha": "1.0"})
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    first = corpora.resolve_corpus("embedded", 500, progress=said.append)
    assert "training tokens" in said[-1] or "held-out tokens" in said[-1]
    said.clear()
    assert corpora.resolve_corpus("embedded", 500, progress=said.append).path == first.path
    assert said == []
    assert corpora.resolve_corpus(first.path).fingerprint == first.fingerprint
    monkeypatch.setattr(embedded, "installed_versions", lambda: {"alpha": "1.1"})
    assert corpora.resolve_corpus("embedded", 500).path != first.path


def test_two_processes_at_once_build_only_one(tmp_path: Path) -> None:
    made_up_packages(tmp_path / "sources")
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "sources"), str(tmp_path / "cache")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    outputs = [process.communicate()[0] for process in [start(), start()]]
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert sum("training a tokenizer" in output for output in outputs) == 1


@pytest.mark.parametrize("moment", ["reading", "removing", "training", "writing"])
def test_a_build_killed_at_any_moment_leaves_nothing_to_open_and_the_next_succeeds(tmp_path: Path, moment: str) -> None:
    made_up_packages(tmp_path / "sources")
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "sources"), str(tmp_path / "cache")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    time.sleep(0.02 if moment == "writing" else 0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for folder in (tmp_path / "cache").glob("embedded-*[0-9a-f]/"):
        TokenSet.open(folder).verify()  # only if it was finished before the signal came
    output = run_python(BUILD, str(tmp_path / "sources"), str(tmp_path / "cache")).stdout
    TokenSet.open(output.splitlines()[-1].split()[1]).verify()
    assert not list((tmp_path / "cache").glob(".*"))


def test_an_unknown_corpus_is_answered_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="use 'embedded', 's', 'm', 'l' or the folder of a token set"):
        corpora.resolve_corpus(tmp_path / "nothing")


def test_a_tier_is_found_by_name_once_it_is_built(built: TokenSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mmfree corpus build m --vocab 500"):
        corpora.resolve_corpus("m", 500)
    corpora.tier_folder("m", 500).symlink_to(built.path)
    assert corpora.resolve_corpus("m", 500).fingerprint == built.fingerprint


def test_importing_the_package_is_cheap_and_brings_no_jax() -> None:
    modules = "mmfree_jax.data.corpora, mmfree_jax.data.reading.pipeline"
    code = f"import sys, {modules}; print('jax' in sys.modules, 'grain' in sys.modules)"
    assert run_python(code).stdout == "False False\n"


@pytest.mark.slow
def test_the_installed_packages_give_a_corpus_to_train_on(tmp_path: Path) -> None:
    began = time.monotonic()
    real = embedded.build_embedded(tmp_path / "set", 2048)
    assert time.monotonic() - began < 300  # 20 s on two idle cores; CI machines are neither
    real.verify()
    train, valid = real.split("train"), real.split("valid")
    assert len(train) > 4_000_000
    assert 220_000 < len(valid) < 400_000
    assert 2.4 < real.bytes_per_token("valid") < 3.6
    counts = np.bincount(train[:], minlength=real.vocab_size)
    assert (counts > 0).sum() > 0.95 * real.vocab_size
    assert [s["source"] for s in real.card["sources"]] == list(embedded.installed_versions())
