"""The harness's own command line, `lm_eval`, which knows `--model mmfree`."""

from lm_eval.__main__ import cli_evaluate

import mmfree_jax.evaluation.harness  # noqa: F401  # registers the adapter

cli_evaluate()
