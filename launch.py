"""The command line: `python launch.py VERB …`. Verbs only; what they do lives in the packages."""

import importlib
import sys

VERBS = {
    "study": ("mmfree_jax.cli", "study", "train a sweep, fit it, compare the families, write the report"),
    "sweep": ("mmfree_jax.cli", "sweep", "train every run of an experiment"),
    "train": ("mmfree_jax.cli", "train", "train one preset, with overrides"),
    "evaluate": ("mmfree_jax.cli", "evaluate", "held-out loss of a model"),
    "import": ("mmfree_jax.cli", "import_model", "a Hugging Face folder into a model to train on"),
    "export": ("mmfree_jax.cli", "export_model", "a model into a Hugging Face folder"),
    "bench": ("mmfree_jax.bench.cli", "main", "time the operations and the training step on this machine"),
    "coordinates": ("mmfree_jax.coordinates", "main", "how far activations move in a few steps, width by width"),
    "lower": ("mmfree_jax.lowering.cli", "main", "judge a run for a machine that is not here"),
    "corpus": ("mmfree_jax.data.cli", "main", "build, check, pack and measure token sets"),
}
SCALING = {
    "fit": "fit a scaling law to each family of a runs table",
    "compare": "compare two families: difference, crossover, verdict",
    "crossover": "the compute at which two families meet, with its interval",
    "backtest": "fit the cheap runs, predict the dear ones",
    "allocate": "the best model size and token budget for an amount of compute",
    "predict": "the loss of a run that has not been made",
    "plan": "the cheapest ladder that would decide which family wins",
    "power": "what a proposed ladder would show, before it is run",
    "plot": "draw a runs table",
    "lint": "list what is wrong with a runs table",
    "report": "write the report on a runs table",
    "verify": "refit public tables and print published against ours",
}


def usage() -> str:
    """The text of --help."""
    rows = {**{verb: text for verb, (_, _, text) in VERBS.items()}, **SCALING}
    lines = [f"  {verb:<12} {text}" for verb, text in rows.items()]
    return "usage: python launch.py VERB … (VERB --help tells more; --debug shows tracebacks)\n\n" + "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run one verb; returns the exit status: 0 ok, 1 error, 2 a gate failed, 75 preempted, 130 interrupted."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 1
    verb, *rest = arguments
    if verb not in VERBS and verb not in SCALING:
        print(f"launch.py: no verb {verb!r}; one of {', '.join([*VERBS, *SCALING])}", file=sys.stderr)
        return 1
    try:
        if verb in SCALING:
            return importlib.import_module("scaling.__main__").main([verb, *rest, *(["--debug"] if debug else [])])
        module, name, _ = VERBS[verb]
        return getattr(importlib.import_module(module), name)(rest)
    except KeyboardInterrupt:
        print(f"launch.py {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"launch.py {verb}: {importlib.import_module('mmfree_jax.errors').reported(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    importlib.import_module("mmfree_jax.output").make_streams_tolerant()
    sys.exit(main(sys.argv[1:]))
