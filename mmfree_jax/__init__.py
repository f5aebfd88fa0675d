"""Train MatMul-free language models and the baselines they are judged against.

    import mmfree_jax

    run = mmfree_jax.preset("matmul-free-tiny", {"steps": 100})
    row = mmfree_jax.train(run, "runs/tiny")     # resumes what is there; row["loss"] is the held-out loss
    model = mmfree_jax.load("runs/tiny")         # logits = model(tokens)
    mmfree_jax.evaluate("runs/tiny")
    mmfree_jax.export("runs/tiny", "exported")   # a Hugging Face folder

`mmfree_jax.api` documents these functions. Importing this package is instant: JAX is imported with the first of them.
"""

import importlib
from typing import Any

__all__ = ["evaluate", "export", "load", "preset", "train"]


# PEP 562: called for a name that the module does not have yet.
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("mmfree_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
