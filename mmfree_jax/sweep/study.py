"""A study: corpus -> sweep -> runs table -> fit -> report, resumable at any point."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mmfree_jax.config import DataConfig, require
from mmfree_jax.data import TokenSet, resolve_data
from mmfree_jax.data.corpora import CorpusPlace
from mmfree_jax.files import locked, write_atomically, write_json
from mmfree_jax.output import line_printer
from mmfree_jax.run_folder import changes, check_data, claim, corpus_places, with_corpus, with_saved_choices
from mmfree_jax.sweep.executor import Executor, open_chains
from mmfree_jax.sweep.experiment import Study, run_flops
from mmfree_jax.sweep.heartbeat import file_clock
from mmfree_jax.sweep.slurm import jobs_of_runs
from mmfree_jax.sweep.status import collect, run_folder, status
from mmfree_jax.sweep.view import View, describe


def sweep(study: Study, out: Path, console: Console, executor: Executor, again: bool = False) -> int:
    """Train the runs that are not done and write runs.csv. Returns the exit status: 0 done, 1 a run failed, 75, 130.

    Runs that have diverged are not tried again unless `again`.
    """
    with locked(out):
        plan = executor.plan(study.runs)  # first, because it refuses runs for which there are no machines
        token_set = prepare(study, out, console)
        say = line_printer(console)
        say("\n".join(plan))
        with View([(run, run_folder(out, run)) for run in study.runs], console) as view:
            code = executor.execute(out, open_chains(out, study.runs, again), view.update)
        table = collect(out, study.runs)
        found = [status(run_folder(out, run), run) for run in study.runs]
        for failed in (s for s in found if s.state == "failed"):
            log = run_folder(out, failed.config) / "log.txt"  # missing if the run has not begun
            hints = [f"see {log}"] * log.exists() + ["--again runs it again"] * failed.diverged
            hint = f"\n        {'; '.join(hints)}" if hints else ""
            say(Text.assemble(("failed", "red"), f"  {describe(failed)}{hint}"))
        say(f"runs table: {table} (corpus {token_set.fingerprint[:16]})")
        ended = sum(s.state == "done" for s in found)
        if code:
            say(f"interrupted with {ended} of {len(found)} runs done: the same command goes on")
        return code or int(ended < len(found))


def prepare(study: Study, out: Path, console: Console) -> TokenSet:
    """Find the corpus, check every run against it and against the runs in `out`, and write each config.json.

    Raises ConfigError before anything is run or written, naming every run that the experiment file has changed.
    """
    say = line_printer(console)
    # What is read, without how it is cut into batches: one corpus, but perhaps several mixtures with it.
    parts = [
        DataConfig(data.corpus, data.vocab, mixture=data.mixture, weights=data.weights)
        for data in (run.data for run in study.runs)
    ]
    places: dict[DataConfig, tuple[CorpusPlace, ...]] = {}
    for run, one in zip(study.runs, parts, strict=True):
        places[one] = places.get(one) or corpus_places(run_folder(out, run))  # of the first run that has begun
    found = {one: resolve_data(one, say, places[one]) for one in dict.fromkeys(parts)}
    runs = []
    for run, one in zip(study.runs, parts, strict=True):
        check_data(run, found[one])
        runs.append(with_corpus(run, found[one]))
    changed = [f"{run.name} ({why})" for run in runs if (why := changes(run, run_folder(out, run)))]
    require(
        not changed,
        f"{out} holds other runs of these names: {'; '.join(changed)}. Rename them in the experiment file, put them "
        "back as they were, or choose another folder",
    )
    for run in runs:
        folder = run_folder(out, run)
        claim(with_saved_choices(run, folder), folder)
    write_json(out / "sweep.json", {"study": study.name, "runs": [run.name for run in study.runs]})
    # The report names its sources, so the cards of all corpora lie beside it, also where the corpora do not.
    paths = dict.fromkeys(one.path for token_set in found.values() for one in token_set.sets)
    for number, path in enumerate(paths, 1):
        for ending in ("json", "md"):
            text = (path / f"data_card.{ending}").read_text(encoding="utf-8")
            write_atomically(out / (f"data_card.{ending}" if number == 1 else f"data_card-{number}.{ending}"), text)
    return found[parts[0]]


def run_study(study: Study, out: Path, console: Console, executor: Executor, again: bool = False) -> int:
    """Run the sweep and write the report on it. Returns the exit status of the sweep."""
    if code := sweep(study, out, console, executor, again):
        return code
    # Imported here, because plotting libraries take longer to load than a finished sweep takes to check.
    from scaling.report.write import write_report
    from scaling.tables.curves import sweep_curves
    from scaling.tables.runs import Runs

    report = write_report(
        Runs.read(out / "runs.csv"),
        out / "report",
        curves=sweep_curves(out),
        title=study.title,
        provenance=provenance(study),
        baseline=study.baseline,
    )
    say = line_printer(console)
    say(report.terminal_summary(console.width))
    say(f"\nreport: {out / 'report' / 'report.html'}")
    return 0


def provenance(study: Study) -> dict[str, Any]:
    """Return what the report says about the origin of its numbers."""
    data = study.runs[0].data
    # One number, or the smallest and the largest of several.
    span = lambda numbers: " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    mixtures = dict.fromkeys(" + ".join([run.data.corpus, *run.data.mixture]) for run in study.runs)
    return {
        "study": study.name,
        "corpus": f"{' or '.join(mixtures)}, vocabulary {data.vocab}",
        "sequence": f"{span([run.data.sequence for run in study.runs])} tokens",
        "batch": f"{span([run.data.tokens_per_step for run in study.runs])} tokens a step",
        **study.notes,
    }


def plan_lines(study: Study, executor: Executor) -> list[str]:
    """Describe what a sweep would do, without doing it (--dry-run)."""
    total = sum(run_flops(run) for run in study.runs)
    lines = [
        f"{run.name}: steps {run.first_step}..{run.steps}, {run.positions:,} tokens, lr {run.optim.lr:g}, "
        f"{run_flops(run):.3g} FLOP" + (f", after {run.branch.run}" if run.branch else "")
        for run in study.runs
    ]
    return [*lines, f"{total:.3g} FLOP", *executor.plan(study.runs)]


def status_lines(study: Study, out: Path) -> list[str]:
    """Describe each run in a line: state, step and loss, speed and time left, where it runs or waits (--status)."""
    require(out.is_dir(), f"{out}: no such sweep folder")
    now, jobs = file_clock(out), jobs_of_runs(out)
    lines = []
    for run in study.runs:
        found = status(run_folder(out, run), run, now)
        job = jobs.get(run.name)
        waits = f"  job {job.job} {job.state.lower()}" if job and found.state in ("waiting", "stopped") else ""
        lines.append(f"{found.state:>7}  {describe(found)}{waits}")
    return lines
