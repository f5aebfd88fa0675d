"""The command line, `python -m scaling VERB`; thin, the work is elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scaling.fitting.fit import Fit, Gate, fit, ladder_gate
from scaling.laws.forms import LAWS, law_named
from scaling.lint import lint
from scaling.tables.runs import Runs, ScalingError, as_number
from scaling.uncertainty.bootstrap import Draws, bootstrap, interval
from scaling.uncertainty.sensitivity import delta_from_noise
from scaling.verdict.compare import Comparison, break_even, compare, headline
from scaling.verdict.costs import AXES
from scaling.verify import verify

OK, ERROR, GATE = 0, 1, 2
OBJECTIVES = ("huber", "lad", "log-ls", "raw-ls")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 (ok), 1 (error, one line on stderr) or 2 (a gate failed)."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ScalingError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return ERROR


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line, exit code 1 (argparse would say 2, which means a gate)."""

    def error(self, message: str) -> Any:
        print(f"error: {self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(ERROR)


def parser() -> argparse.ArgumentParser:
    top = OneLineParser(
        prog="scaling", description="Scaling laws from a table of runs, with intervals and certificates."
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=OneLineParser)
    for name, run, help_text, groups in (
        ("fit", run_fit, "fit a law to every family", ("fit", "out")),
        ("compare", run_compare, "compare two families: difference, crossover, verdict", ("fit", "pair", "out")),
        ("crossover", run_crossover, "where B overtakes A, with its interval", ("fit", "pair")),
        ("plan", run_plan, "the cheapest ladder that would decide the crossing", ("fit", "pair", "plan")),
        ("plot", run_plot, "draw end points and whole curves", ("plot",)),
        ("lint", run_lint, "faults of the table and the design, with row ids", ()),
        ("report", run_report, "fits, comparison, figures and verdict in one folder", ("fit", "report")),
    ):
        verb = verbs.add_parser(name, help=help_text, description=help_text)
        verb.set_defaults(run=run)
        table_arguments(verb)
        for group in groups:
            GROUPS[group](verb)
    predict = verbs.add_parser("predict", help="loss at given N and D from a fit.json or its folder")
    predict.add_argument("artefact", type=Path)
    predict.add_argument("--N", type=positive, required=True, help="parameters")
    predict.add_argument("--D", type=positive, required=True, help="training tokens")
    predict.add_argument("--family", help="one family; all of them without it")
    common_arguments(predict, run_predict)
    check = verbs.add_parser("verify", help="refit public tables and print published against ours")
    check.add_argument("--data", type=Path, required=True, help="folder that holds the public tables")
    common_arguments(check, run_verify)
    return top


def positive(text: str) -> float:
    value = float(text)
    if not (np.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def threshold(text: str) -> float | None:
    """A positive number, or None for auto."""
    return None if text == "auto" else positive(text)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive count")
    return int(text)


def common_arguments(verb: argparse.ArgumentParser, run: Any = None) -> None:
    verb.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if run is not None:
        verb.set_defaults(run=run)


def table_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("runs", type=Path, help="CSV or JSONL table, or a sweep directory")
    verb.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="e.g. N=params")
    verb.add_argument("--set", action="append", default=[], metavar="COLUMN=VALUE", help="a column of one value")
    verb.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="keep rows: family=llama, N>=1e8"
    )
    verb.add_argument("--allow-midrun", action="store_true", help="accept points inside a run (they mislead fits)")
    common_arguments(verb)


def fit_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--law", default="chinchilla", choices=sorted(LAWS))
    verb.add_argument("--objective", default="huber", choices=OBJECTIVES)
    verb.add_argument(
        "--delta",
        type=threshold,
        default=1e-3,
        help="Huber threshold on log loss, or auto: from the noise (default 1e-3)",
    )
    verb.add_argument("--draws", type=count, default=2000, help="bootstrap draws (default 2000)")
    verb.add_argument("--seed", type=int, default=0)


def pair_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--a", help="baseline family (default: the table's first)")
    verb.add_argument("--b", help="the family compared with it (default: the table's second)")
    share_argument(verb)
    verb.add_argument("--horizon", type=positive, help="cost up to which a crossing is looked for")
    verb.add_argument("--axis", default="flops", choices=sorted(AXES), help="what is compared at equal amounts")
    verb.add_argument("--along", default="optimal", help="optimal, ratio=20 (tokens a parameter) or size=1e9")
    verb.add_argument("--energy", action="append", default=[], metavar="CLASS=PJ", help="picojoules per operation")
    verb.add_argument("--usd-per-hour", type=positive, help="price of an accelerator, for --axis usd")


def share_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--share", default="E", help="parameters common to both, e.g. E or E,B,beta; '' for none")


def out_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, help="folder for the full report (HTML, figures, fit.json)")


def plot_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--x", default="flops", choices=("flops", "D", "N"))
    verb.add_argument("--out", type=Path, required=True, help="PNG, SVG or PDF file")


def plan_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--budget", type=positive, required=True, help="FLOP for all planned runs of both families")
    verb.add_argument("--target-sd", type=positive, default=0.3, help="sd of log10 C* that is enough (default 0.3)")
    verb.add_argument("--target", type=positive, help="FLOP at which the difference is asked for, not the crossing")
    verb.add_argument("--max-run", type=positive, default=float("inf"), help="FLOP that one run may cost")
    verb.add_argument("--max-memory", type=positive, default=float("inf"), help="bytes of weights and optimizer state")
    verb.add_argument("--max-hours", type=positive, default=float("inf"), help="hours that one run may take")
    verb.add_argument("--flops-per-second", type=positive, default=1e14, help="training speed, for --max-hours")
    verb.add_argument("--ratios", default="5,10,20,40,80,160", help="tokens per parameter to choose from")
    verb.add_argument("--experiment", type=Path, help="write the plan as an experiment file for launch.py sweep")


def report_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, required=True, help="folder to write into")
    verb.add_argument("--title", default="Loss against compute")
    verb.add_argument("--baseline", help="family that the others are compared with")
    share_argument(verb)


GROUPS = {
    "fit": fit_arguments,
    "pair": pair_arguments,
    "out": out_argument,
    "plan": plan_arguments,
    "plot": plot_arguments,
    "report": report_arguments,
}


def assignments(pairs: Sequence[str], flag: str) -> dict[str, str]:
    out = {}
    for text in pairs:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ScalingError(f"{flag} {text!r} is not NAME=VALUE")
        out[name.strip()] = value.strip()
    return out


def delta_of(a: argparse.Namespace, runs: Runs) -> float:
    """The Huber threshold asked for."""
    return delta_from_noise(runs, a.law) if a.delta is None else a.delta


def read_table(a: argparse.Namespace, allow_midrun: bool = False) -> Runs:
    columns, constants = assignments(a.column, "--column"), assignments(a.set, "--set")
    return Runs.read(a.runs, columns, a.where, constants, a.allow_midrun or allow_midrun)


def shared(a: argparse.Namespace) -> tuple[str, ...]:
    return tuple(name.strip() for name in a.share.split(",") if name.strip())


def exit_code(gates: Sequence[Gate]) -> int:
    return OK if all(g.passed for g in gates) else GATE


def print_gates(gates: Sequence[Gate]) -> None:
    for gate in gates:
        if not gate.passed:
            print(f"GATE {gate.name}: {gate.message}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def run_fit(a: argparse.Namespace) -> int:
    runs = read_table(a)
    if a.out:
        return full_report(a, runs, share=("E",), gate=True)
    results: dict[str, tuple[Fit, Draws]] = {}
    for family in runs.families:
        fitted = fit(runs.family(family), a.law, a.objective, delta_of(a, runs), seed=a.seed)
        results[family] = fitted, bootstrap(fitted, a.draws, a.seed)
    gates = [g for f, _ in results.values() for g in f.gates] + [ladder_gate(runs, f) for f in runs.families]
    if a.json:
        from scaling.report.artefact import family_json

        print_json(
            {"families": {name: family_json(*pair) for name, pair in results.items()}, "notes": list(runs.notes)}
        )
        return exit_code(gates)
    for family, (fitted, draws) in results.items():
        print_fit(family, fitted, draws)
    print_gates(gates)
    return exit_code(gates)


def print_fit(family: str, fitted: Fit, draws: Draws) -> None:
    c, ends = fitted.certificate, draws.intervals()
    rows = len(fitted.runs)
    print(f"{family}: {fitted.law.name}, {fitted.objective.name}, {rows} rows, {draws.clusters[0]} clusters")
    for name, value in fitted.params.items():
        print(f"  {name:<6} {value:<12.6g} 95 % {ends[name][0]:.5g} to {ends[name][1]:.5g}  ({draws.method} bootstrap)")
    gap = f"second solver {c.second_solver_gap:+.0e}"
    print(f"  {c.agreeing} of {c.starts} starts agree, gradient {c.gradient:.0e}, {gap}")


def comparison(a: argparse.Namespace) -> Comparison:
    runs = read_table(a)
    names = runs.families
    first = a.a or names[0]
    rest = [name for name in names if name != first]
    if not a.b and not rest:
        raise ScalingError(f"the table holds one family, {names[0]!r}; a comparison needs two")
    energy = {name: positive_setting(value, "--energy") for name, value in assignments(a.energy, "--energy").items()}
    options = {"law": a.law, "objective": a.objective, "delta": delta_of(a, runs), "horizon": a.horizon}
    axes = {"axis": a.axis, "along": a.along, "energy": energy, "usd_per_hour": a.usd_per_hour}
    return compare(runs, first, a.b or rest[0], shared(a), a.draws, a.seed, **options, **axes)


def positive_setting(text: str, flag: str) -> float:
    value = as_number(text)
    if value is None or not value > 0:
        raise ScalingError(f"{flag}: {text!r} is not a positive number")
    return value


def run_compare(a: argparse.Namespace) -> int:
    if a.out:
        runs = read_table(a)
        return full_report(a, runs, share=shared(a), baseline=a.a, gate=True)
    c = comparison(a)
    if a.json:
        from scaling.report.artefact import comparison_json

        print_json(comparison_json(c) | {"gates": [asdict(g) for g in c.gates]})
        return exit_code(c.gates)
    print("\n".join(c.verdict))
    if c.axis == "flops" and c.along == "optimal":
        print(break_even(c, c.measured[1]).sentence(c.a, c.b))
    print_gates(c.gates)
    return exit_code(c.gates)


def run_crossover(a: argparse.Namespace) -> int:
    c = comparison(a)
    if a.json:
        from scaling.report.artefact import comparison_json

        print_json(comparison_json(c)["crossover"])
        return OK
    x = c.crossover
    print(c.verdict[0] if any(not g.passed for g in c.gates if g.name.startswith("ladder")) else headline(c))
    print(f"share of draws in which the order never changes before {x.horizon:.1e} {c.unit}: {x.p_none:.3f}")
    for flops in 10.0 ** np.arange(np.ceil(np.log10(c.measured[0])), np.log10(x.horizon) + 1e-9):
        print(f"  P({c.b} leads for good by {flops:.0e} {c.unit}) = {x.p_before(flops):.3f}")
    return OK


def run_plan(a: argparse.Namespace) -> int:
    from scaling.verdict.experiment_file import write_experiment
    from scaling.verdict.plan import candidates, cheapest, next_values

    c = comparison(a)
    ratios = [positive_setting(text, "--ratios") for text in a.ratios.split(",")]
    low = float(c.fit.runs["N"].min())
    sizes = np.geomspace(low, max(np.sqrt(a.budget / (6 * min(ratios))), 2 * low), 24)
    cap = min(a.max_run, a.max_hours * 3600 * a.flops_per_second)
    options = candidates(sizes.tolist(), sorted(ratios), cap, a.max_memory)
    plan = cheapest(c, options, a.budget, a.target_sd, a.target)
    enough = plan.sd_then <= a.target_sd
    if a.experiment:
        write_experiment(plan, c.fit.runs, (c.a, c.b), a.experiment)
    if a.json:
        print_json(asdict(plan) | {"enough": enough})
        return OK if enough else GATE
    print("\n".join(plan.lines()))
    print("value of the next trunk, best per FLOP first:")
    for value in next_values(c, options, a.target)[:5]:
        ratio_text = ", ".join(f"{r:g}" for r in value.trunk.ratios)
        gain = f"sd falls by {value.shrink:.3f} for {value.trunk.flops:.1e} FLOP"
        print(f"  N {value.trunk.n:.3g} at {ratio_text} tokens a parameter: {gain}")
    if not enough:
        print(f"GATE plan: the budget leaves an sd of {plan.sd_then:.2f}; {a.target_sd:g} was asked for")
    return OK if enough else GATE


def run_predict(a: argparse.Namespace) -> int:
    from scaling.report.artefact import read_draws, read_fit_json

    data, draws = read_fit_json(a.artefact), read_draws(a.artefact)
    names = [a.family] if a.family else list(data["families"])
    out = {}
    for name in names:
        if name not in data["families"]:
            raise ScalingError(f"fit.json has no family {name!r}; it has {', '.join(data['families'])}")
        entry = data["families"][name]
        out[name] = predict_entry(entry, draws[name], a.N, a.D)
    if a.json:
        print_json(out)
        return OK
    for name, result in out.items():
        ratio = result["extrapolation"]
        beyond = "within the fitted range" if ratio <= 1 else f"{ratio:.3g} times the largest fitted compute"
        print(
            f"{name}: {result['loss']:.4f} nats per token, 95 % {result['low']:.4f} to {result['high']:.4f}; {beyond}"
        )
    return OK


def predict_entry(entry: dict[str, Any], draws: np.ndarray, n: float, d: float) -> dict[str, float]:
    """Prediction of one family's entry of a fit.json, with the interval of its stored draws."""
    law, centre = law_named(entry["law"]), np.array(entry["centre"])
    features = law.features_at(np.log([n]), np.log([d]), centre)
    loss = np.exp(law.value(np.array([entry["theta"]]), features))[0, 0]
    low, high = interval(np.exp(law.value(draws, features))[:, 0])
    ratio = 6 * n * d / entry["largest_flops_6nd"]
    return {"loss": float(loss), "low": low, "high": high, "extrapolation": float(ratio)}


def run_plot(a: argparse.Namespace) -> int:
    from scaling.report.plot import runs_figure, save
    from scaling.report.views import runs_views
    from scaling.tables.curves import sweep_curves

    if a.out.suffix not in {".png", ".svg", ".pdf"}:
        raise ScalingError(f"--out {a.out} must end in .png, .svg or .pdf")
    runs = read_table(a, allow_midrun=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    save(runs_figure(runs_views(runs), a.x, sweep_curves(a.runs)), a.out)
    print(a.out)
    return OK


def run_lint(a: argparse.Namespace) -> int:
    findings = lint(read_table(a, allow_midrun=True))
    if a.json:
        print_json([asdict(f) for f in findings])
        return OK
    for finding in findings:
        print(
            f"{finding.severity} {finding.name}: {finding.message}" + (f" [{finding.listed()}]" if finding.rows else "")
        )
    print("no faults found" if not findings else f"{len(findings)} finding(s)")
    return OK


def run_report(a: argparse.Namespace) -> int:
    return full_report(a, read_table(a), share=shared(a), baseline=a.baseline, title=a.title)


def full_report(a: argparse.Namespace, runs: Runs, gate: bool = False, **options: Any) -> int:
    """Writes the report folder; `fit` and `compare` answer with their gates, `report` prints them as verdicts."""
    from scaling.report.write import write_report
    from scaling.tables.curves import sweep_curves

    settings = {"law": a.law, "objective": a.objective, "delta": delta_of(a, runs), "draws": a.draws, "seed": a.seed}
    report = write_report(runs, a.out, curves=sweep_curves(a.runs), provenance={}, **settings, **options)
    if a.json:
        print((a.out / "fit.json").read_text(), end="")
    else:
        print(report.terminal_summary())
        print(f"\n{a.out / 'report.html'}")
    return exit_code(report.gates) if gate else OK


def run_verify(a: argparse.Namespace) -> int:
    rows = verify(a.data)
    if a.json:
        print_json([asdict(r) for r in rows])
    else:
        for row in rows:
            print(row.line())
    return OK if all(r.passed for r in rows) else GATE


if __name__ == "__main__":
    sys.exit(main())
