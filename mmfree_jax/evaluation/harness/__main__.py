"""The harness's own command line, `lm_eval`, which knows `--model mmfree`."""

from lm_eval.__main__ import cli_evaluate

import mmfree_jax.evaluation.harness  # noqa: F401  # registers the adapter
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.files import cache_folder

use_compile_cache(cache_folder() / "compiled")
cli_evaluate()
