"""What a run is: told by its config and its row, whatever folder, device or environment it was begun in."""

import csv
import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from mmfree_jax import devices
from mmfree_jax.config import Branch, ConfigError, RunConfig, from_dict, to_json
from mmfree_jax.data import Counts, resolve_data
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.files import read_json
from mmfree_jax.run_folder import HOW, changes, claim, corpus_places, read_run, with_corpus, with_saved_choices
from mmfree_jax.sweep.status import collect
from mmfree_jax.training import identity as identities
from mmfree_jax.training.identity import SILENT, identity
from mmfree_jax.training.loop import result_row, train
from mmfree_jax.training.metrics import Progress
from scaling import Runs
from tests.conftest import sentences, tiny_model, tiny_run


@pytest.fixture
def corpus(token_set, tmp_path, monkeypatch) -> Path:
    """A copy of the corpus as `c` in the working directory."""
    shutil.copytree(token_set.path, tmp_path / "c")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "c"


def run_on(place: str, **changes) -> RunConfig:
    run = tiny_run("matmul-free", Path("-"), **changes)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, corpus=place))


def test_every_way_to_name_a_corpus_is_the_same_run(corpus, tmp_path, monkeypatch):
    run = run_on("c", steps=6)
    result = train(run, tmp_path / "run", resolve_data(run.data))
    folder = tmp_path / "run"
    for place, where in (("c/", "."), ("./c", "."), (str(corpus), "."), ("../c", "elsewhere"), ("c", "elsewhere")):
        monkeypatch.chdir(tmp_path / where)
        again = run_on(place, steps=6)
        token_set = resolve_data(again.data, places=corpus_places(folder))
        begun = with_saved_choices(with_corpus(again, token_set), folder)
        assert begun.fingerprint() == read_run(folder / "config.json").fingerprint()
        assert result["fingerprint"] == read_run(folder / "config.json").fingerprint()
        assert train(again, folder, token_set) == result


def test_a_moved_corpus_is_accepted_for_what_it_holds_and_another_in_its_place_is_not(corpus, tmp_path, monkeypatch):
    run, folder = run_on("c", steps=6, checkpoint_every=3), tmp_path / "run"
    result = train(run, folder, resolve_data(run.data))
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "6")
    shutil.move(corpus, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"no corpus 'c'.*the run read it from .*/c, which is gone"):
        resolve_data(run.data, places=corpus_places(folder))
    moved = run_on("moved", steps=6, checkpoint_every=3)
    assert train(moved, folder, resolve_data(moved.data, places=corpus_places(folder)))["loss"] == result["loss"]
    assert read_run(folder / "config.json").data.corpus == str(tmp_path / "moved")  # where it is looked for from now on
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_data(moved.data, places=corpus_places(folder)).path == tmp_path / "moved"
    texts = {"train": sentences(250, 2), "valid": sentences(25, 3)}
    write_token_set(corpus, texts, byte_tokenizer(), {"name": "c", "description": "other", "sources": []})
    other = resolve_data(run_on(str(corpus)).data, places=corpus_places(folder))
    with pytest.raises(
        ConfigError, match=r"holds another run \(its data are .*/moved \(\w{16}\), not .*/c \(\w{16}\)\)"
    ):
        train(run_on(str(corpus), steps=6, checkpoint_every=3), folder, other)


def test_a_named_corpus_is_the_one_that_the_run_began_with(token_set, tmp_path, monkeypatch):
    """As "embedded", which is another one when packages have changed."""
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path))
    shutil.copytree(token_set.path, tmp_path / "tier-s-257")
    run = run_on("s", steps=6)
    train(run, tmp_path / "run", resolve_data(run.data))
    (tmp_path / "tier-s-257").rename(tmp_path / "old")
    texts = {"train": sentences(250, 2), "valid": sentences(25, 3)}
    write_token_set(tmp_path / "tier-s-257", texts, byte_tokenizer(), {"name": "s", "description": "", "sources": []})
    known = corpus_places(tmp_path / "run")
    assert resolve_data(run.data, places=known).fingerprint != token_set.fingerprint  # what lies there now
    kept = [one._replace(path=str(tmp_path / "old")) for one in known]
    assert resolve_data(run.data, places=tuple(kept)).fingerprint == token_set.fingerprint
    with pytest.raises(ConfigError, match=r"its data are s \(\w{16}\), not s \(\w{16}\)"):
        train(run, tmp_path / "run", resolve_data(run.data))


def test_precision_is_settled_at_the_start_and_kept_where_the_run_goes_on(token_set, tmp_path, monkeypatch):
    run = tiny_run("matmul-free", token_set.path, steps=6, checkpoint_every=3)
    train(run, tmp_path / "run", token_set)
    assert read_run(tmp_path / "run" / "config.json").precision == "float32"
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    monkeypatch.setattr("mmfree_jax.training.loop.concrete", lambda p: "bfloat16" if p == "auto" else p)  # a GPU's
    assert train(run, tmp_path / "run", token_set)["precision"] == "float32"
    branch = dataclasses.replace(run, name="branch", branch=Branch("run", 2))
    assert with_saved_choices(branch, tmp_path / "branch").precision == "float32"  # a trunk's is its branches'
    assert with_saved_choices(run, tmp_path / "new").precision == "auto"
    # Also of a run that ended before its first checkpoint, perhaps on another kind of device.
    claim(dataclasses.replace(run, precision="bfloat16"), tmp_path / "early")
    assert with_saved_choices(run, tmp_path / "early").precision == "bfloat16"
    other = dataclasses.replace(run, precision="bfloat16")
    with pytest.raises(ConfigError, match="precision is float32, not bfloat16"):
        train(other, tmp_path / "run", token_set)


def test_the_environment_does_not_choose_the_random_numbers(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, steps=6)
    expected = train(run, tmp_path / "usual", token_set)["loss"]
    with jax.default_prng_impl("unsafe_rbg"):  # as JAX_DEFAULT_PRNG_IMPL
        assert train(run, tmp_path / "other", token_set)["loss"] == expected


@pytest.mark.parametrize("name", devices.SETTINGS)
def test_settings_that_would_change_the_numbers_are_refused_in_a_line(name, token_set, tmp_path, monkeypatch):
    class Config:
        jax_enable_x64, jax_threefry_partitionable, jax_default_matmul_precision = False, True, None

    monkeypatch.setattr(Config, name, "float32" if "precision" in name else not getattr(Config, name))
    monkeypatch.setattr(jax, "config", Config)
    with pytest.raises(ConfigError, match=f"^{name}=.* would change the numbers of the run.*: unset {name.upper()}$"):
        train(tiny_run("matmul-free", token_set.path), tmp_path / "run", token_set)
    assert not (tmp_path / "run").exists()


def leaves(values: dict, path: tuple = ()):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


OTHER = {  # another value of fields that hold no number; None: of one that has no other in this run, or only a place
    "mixer": "rwkv4", "linear": "dense", "output_gate": "paper", "weight_scale": "channel", "parametrisation": "mup",
    "schedule": "cosine", "optimizer": "muon", "init": "/m", "precision": "bfloat16", "name": "other",
    "corpus": None, "contents": None, "vocab": None, "mixture": None, "weights": None, "milestones": None,
    "branch": None, "tokenizer_vocab": None, "base_depth": None, "base_width": None, "base_head": None,
    "heads": None, "kv_heads": None, "rope_theta": None, "activation_bits": 4, "gradient_bits": 8, "momentum": None,
    "activation": "relu2", "on_spike": None, "moments": "bfloat16",
}  # fmt: skip
RUN = RunConfig("r", tiny_model("matmul-free"))


@pytest.mark.parametrize("path", [path for path, _ in leaves(dataclasses.asdict(RUN))], ids=".".join)
def test_whatever_decides_the_numbers_is_in_the_row(path, token_set):
    """Every field there is, and every one that is added: it changes the row, or is known to change no number."""
    key, values = ".".join(path), dataclasses.asdict(RUN)
    if {key, path[0]} & (set(HOW) | SILENT) or OTHER.get(path[-1], path) is None:
        return
    at = values
    for name in path[:-1]:
        at = at[name]
    old = at[path[-1]]
    at[path[-1]] = OTHER.get(
        path[-1], not old if isinstance(old, bool) else old / 2 or 1.0 if isinstance(old, float) else old * 2 or 1
    )
    changed = changed_run(values)
    rows = [result_row(run, token_set, Progress(counts=Counts()), {}) for run in (RUN, changed)]
    columns = {name for name in rows[0] if rows[0][name] != rows[1][name]} - {"fingerprint"}
    assert columns, f"{key} decides numbers, and no column tells"


def changed_run(values: dict) -> RunConfig:
    """The run, with whatever else a changed field needs to be possible."""
    model, optim = values["model"], values["optim"]
    if model["mixer"] != "mlgru":
        model |= {"output_gate": "official", "lower_bounds": True}
    if model["linear"] == "dense":
        model |= {"activation_bits": 8}
    if model["parametrisation"] == "mup":
        model |= {"base_width": 8, "base_depth": 2}
    if optim["final_lr"]:
        optim |= {"schedule": "cosine"}
    if optim["decay_steps"]:
        optim |= {"decay_steps": 10}
    return from_dict(RunConfig, values)


def test_a_row_says_what_is_not_as_usual(token_set):
    run = tiny_run("matmul-free", token_set.path)
    usual = identity(run, token_set)
    assert (usual["settings"], usual["init"], usual["documents"]) == ("usual", "random", "joined")
    assert (usual["activation_bits"], usual["gradient_bits"], usual["optimizer"]) == (8, 0, "adamw")
    dense = identity(tiny_run("transformer++", token_set.path), token_set)
    assert (dense["activation_bits"], dense["gradient_bits"], dense["kv_heads"]) == (None, None, 2)
    optim = dataclasses.replace(run.optim, clip=0.5, beta2=0.99)
    assert identity(dataclasses.replace(run, optim=optim), token_set)["settings"] == "optim.beta2=0.99 optim.clip=0.5"
    data = dataclasses.replace(run.data, corpus="a/b", mixture=("c/d",), weights=(3.0, 1.0))
    assert identity(dataclasses.replace(run, data=data), token_set)["mixture"] == "0.75 b + 0.25 d"


def test_the_code_is_named_by_its_commit_or_by_its_version(monkeypatch, tmp_path):
    identities.code_version.cache_clear()
    monkeypatch.setattr(identities, "__file__", str(tmp_path / "lib" / "mmfree_jax" / "training" / "identity.py"))
    installed = identities.code_version()
    assert installed == identities.importlib.metadata.version("mmfree-jax")

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path / "lib"), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "file").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    for text, ending in (("a", ""), ("b", "-dirty")):
        (tmp_path / "lib" / "file").write_text(text)
        identities.code_version.cache_clear()
        assert identities.code_version() == git("rev-parse", "--short=12", "HEAD").strip() + ending
    identities.code_version.cache_clear()


NEW_FIELDS = (("data", "contents"), ("model", "tokenizer_vocab"))


def test_a_run_of_an_older_version_goes_on(token_set, tmp_path):
    """Its config.json knows nothing of contents, and says "auto"; there is no corpus.json."""
    run = tiny_run("matmul-free", token_set.path, steps=6, checkpoint_every=3)
    folder = tmp_path / "run"
    result = train(run, folder, token_set)
    older = json.loads(to_json(run))
    for group, name in NEW_FIELDS:
        del older[group][name]
    older["data"]["corpus"] = "a/path/that/led/there"
    (folder / "config.json").write_text(json.dumps(older))
    (folder / "corpus.json").unlink()
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "6")
    assert changes(run, folder) == ""  # its checkpoint tells which corpus it was
    texts = {"train": sentences(250, 2), "valid": sentences(25, 3)}
    other = write_token_set(tmp_path / "o", texts, byte_tokenizer(), {"name": "o", "description": "", "sources": []})
    kept = (folder / "config.json").read_text()
    with pytest.raises(ConfigError, match="trained on corpus"):
        train(run, folder, other)
    (folder / "config.json").write_text(kept)
    assert train(run, folder, token_set)["loss"] == result["loss"]
    assert read_run(folder / "config.json") == dataclasses.replace(with_corpus(run, token_set), precision="float32")
    (folder / "config.json").write_text(kept)  # ended, it must be asked for as it was
    assert "data.corpus is" in changes(run, folder)


def test_rows_of_an_older_version_are_collected_and_read_beside_newer_ones(token_set, tmp_path):
    runs = [tiny_run("matmul-free", token_set.path, name=name) for name in ("old", "new")]
    for number, run in enumerate(runs):
        row = result_row(
            run,
            token_set,
            Progress(seconds=1.0, counts=Counts(90, 90, 900)),
            {"loss": 2.0 + number, "loss_se": 0.1, "bpb": 1.0, "tokens": 9},
        )
        if run.name == "old":
            row = {name: value for name, value in row.items() if name == "jax" or name not in identity(run, token_set)}
        folder = tmp_path / "runs" / run.name
        claim(run, folder)
        (folder / "result.json").write_text(json.dumps(row))
    table = collect(tmp_path, runs)
    assert {row["run_id"]: row["optimizer"] for row in csv.DictReader(table.open())} == {"old": "", "new": "adamw"}
    read = Runs.read(table)
    assert read["optimizer"].tolist() == ["", "adamw"]
    assert read["settings"].tolist() == ["", "usual"]


def test_a_settled_vocabulary_says_what_is_padding(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, model=tiny_model("matmul-free", vocab=384))
    result = train(dataclasses.replace(run, steps=6), tmp_path / "run", token_set)
    model = read_run(tmp_path / "run" / "config.json").model
    assert (model.vocab, model.tokenizer_vocab) == (384, 257)
    assert (result["vocab"], result["model_vocab"]) == (257, 384)
    assert read_json(tmp_path / "run" / "corpus.json")["vocab_size"] == 257
