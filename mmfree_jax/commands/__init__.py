"""The command line, `mmfree VERB …` or `python launch.py VERB …`: which function runs each verb, and exit statuses."""

import importlib
import sys

from mmfree_jax.output import make_streams_tolerant, program

# A verb names its module, which is imported when the verb runs: `--help`, a misspelt verb and the verbs of `scaling`
# answer at once, without waiting for JAX.
VERBS = {
    "study": ("mmfree_jax.commands.sweep", "study", "train a sweep, fit it, compare the families, write the report"),
    "sweep": ("mmfree_jax.commands.sweep", "sweep", "train every run of an experiment"),
    "train": ("mmfree_jax.commands.train", "train", "train one preset, with overrides"),
    "evaluate": ("mmfree_jax.commands.evaluate", "evaluate", "score models: losses, tasks, comparisons"),
    "generate": ("mmfree_jax.commands.models", "generate", "complete prompts with a model"),
    "serve": ("mmfree_jax.commands.models", "serve", "serve a model by HTTP, in the shape of OpenAI's API"),
    "import": ("mmfree_jax.commands.models", "import_model", "convert a Hugging Face folder into a model to train on"),
    "export": ("mmfree_jax.commands.models", "export_model", "write a model for others: Hugging Face, packed, GGUF"),
    "bench": ("mmfree_jax.bench.cli", "main", "time the operations and the training step on this machine"),
    "coordinates": ("mmfree_jax.coordinates", "main", "measure how far activations move in a few steps, by width"),
    "lower": ("mmfree_jax.lowering.cli", "main", "predict memory and time of a run on a machine that is not here"),
    "hardware": ("mmfree_jax.hardware.cli", "main", "build, simulate or cost an FPGA core that runs a packed model"),
    "corpus": ("mmfree_jax.data.cli", "main", "build, check, pack and convert token sets"),
}
SCALING = {
    "fit": "fit a scaling law to each family of a runs table",
    "compare": "compare two families: difference, crossover, verdict",
    "crossover": "the compute at which two families meet, with its interval",
    "backtest": "fit the cheap runs, predict the expensive ones",
    "allocate": "the best model size and token budget for an amount of compute",
    "predict": "the loss of a run that has not been made",
    "optima": "the best learning rate and batch size by model size and tokens, from a sweep",
    "plan": "the cheapest ladder that would decide which family wins",
    "power": "what a proposed ladder would show, before it is run",
    "plot": "draw a runs table",
    "lint": "list what is wrong with a runs table",
    "report": "write the report on a runs table",
    "verify": "refit public tables and compare with the published values",
}


def main(arguments: list[str]) -> int:
    """Run one verb. Returns the exit status: 0 ok, 1 error, 2 a gate failed, 75 preempted, 130 interrupted."""
    name, debug = program(), "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = {verb: text for verb, (_, _, text) in VERBS.items()} | SCALING
        print(f"usage: {name} VERB … (VERB --help tells more; --debug shows tracebacks)\n")
        print("\n".join(f"  {verb:<12} {text}" for verb, text in rows.items()))
        return 0 if arguments else 1
    verb, *rest = arguments
    if verb not in VERBS and verb not in SCALING:
        print(f"{name}: no verb {verb!r}; one of {', '.join([*VERBS, *SCALING])}", file=sys.stderr)
        return 1
    # Everything that a user can mend ends in one line here; whatever else was raised leaves its traceback in a file
    # that the line names (`errors.describe`).
    try:
        if verb in SCALING:
            return importlib.import_module("scaling.__main__").main([verb, *rest, *(["--debug"] if debug else [])])
        module, function, _ = VERBS[verb]
        return getattr(importlib.import_module(module), function)(rest)
    except KeyboardInterrupt:
        print(f"{name} {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"{name} {verb}: {importlib.import_module('mmfree_jax.errors').describe(error)}", file=sys.stderr)
        return 1


def command() -> int:
    """Run the verb that this process was started with: the entry point of `mmfree`."""
    make_streams_tolerant()
    return main(sys.argv[1:])
