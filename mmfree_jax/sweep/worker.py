"""One process that trains runs of a sweep one after another: `python -m mmfree_jax.sweep.worker OUT RUN [RUN …]`.

The runs of one chain share a compiled step, so a chain given to one worker compiles once. The command is idempotent:
finished runs are passed over, half-done ones taken up. Exit status: 0 all done, 1 a run failed, 75 or 130 stopped.
"""

import functools
import sys
import traceback
from pathlib import Path

from mmfree_jax.config import RunConfig, from_json
from mmfree_jax.data.corpora import cache_folder, resolve_data
from mmfree_jax.devices import use_compile_cache
from mmfree_jax.sweep.status import fail
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.loop import train


def main(out: Path, names: list[str]) -> int:
    """Train the named runs of the sweep in `out`, in order."""
    use_compile_cache(cache_folder() / "compiled")
    resolve = functools.cache(resolve_data)  # the runs of a chain read one corpus: it is opened once
    failed: set[str] = set()
    for name in names:
        folder = out / "runs" / name
        config = from_json(RunConfig, (folder / "config.json").read_text(encoding="utf-8"))
        (folder / "error.txt").unlink(missing_ok=True)
        if config.branch is not None and config.branch.run in failed:
            fail(folder, f"not started: its trunk {config.branch.run} failed")
            failed.add(name)
            continue
        try:
            train(config, folder, resolve(config.data))
        except Interrupted as stop:
            return stop.status
        except Exception as error:  # one bad run must not take the rest of its chain with it
            traceback.print_exc()
            fail(folder, f"{type(error).__name__}: {error}")
            failed.add(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
