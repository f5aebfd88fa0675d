"""Work spread over processes that do not depend on the caller's `__main__`, threads or start method."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# The pipe stays open while the parent lives. A worker whose parent was killed must not continue to write.
_PROGRAM = """
import importlib, os, pickle, sys, threading
module, name, argument = pickle.load(sys.stdin.buffer)
watch = lambda: (os.read(0, 1), os._exit(1))
threading.Thread(target=watch, daemon=True).start()
result = getattr(importlib.import_module(module), name)(argument)
with open(sys.argv[1], "wb") as file:
    pickle.dump(result, file, protocol=5)
sys.stdout.flush()
os._exit(0)
"""


class WorkerError(RuntimeError):
    """A worker process failed; the message is the last line that it wrote."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _call(folder: Path, running: set[subprocess.Popen], number: int, module: str, name: str, argument: Any) -> Any:
    """Call a function in a process of its own, which is in `running` meanwhile, and return its result."""
    # A program of its own instead of `multiprocessing`: a fork after JAX has started threads can hang, and spawn
    # would run the caller's `__main__` again, which may be a notebook or a script without a guard.
    output, errors = folder / f"{number}", folder / f"{number}.err"
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with errors.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(output)],
            stdin=subprocess.PIPE,
            stderr=sink,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
    running.add(process)
    try:
        assert process.stdin is not None
        with process.stdin as pipe:
            pickle.dump((module, name, argument), pipe, protocol=5)
            pipe.flush()
            status = process.wait()
    except BrokenPipeError:  # it died before it had read everything: its own message says why
        status = process.wait()
    finally:
        running.discard(process)
    if status != 0:
        lines = errors.read_text("utf-8", "replace").strip().splitlines()
        raise WorkerError(lines[-1] if lines else f"a data worker ended with exit status {status}")
    return pickle.loads(output.read_bytes())


def run_parts(
    module: str,
    name: str,
    parts: Sequence[Any],
    processes: int | None = None,
    done: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:
    """Call `module.name(part)` for every part, each in a process of its own, at most `processes` at a time.

    Returns the results in the order of the parts; `done(number, result)` is told of each as it comes. A single part is
    done in this process. Raises WorkerError for the first that fails, after ending the others.
    """
    # Threads only wait: each starts a process for a part and reads its result, so at most `processes` run at once.
    if len(parts) == 1:
        result = getattr(importlib.import_module(module), name)(parts[0])
        done(0, result)
        return [result]
    results: list[Any] = [None] * len(parts)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(processes or available_cores()) as threads:
        running: set[subprocess.Popen] = set()
        submit = lambda i, part: threads.submit(_call, Path(folder), running, i, module, name, part)
        waiting = {submit(i, part): i for i, part in enumerate(parts)}
        try:
            for future in as_completed(waiting):
                number = waiting[future]
                results[number] = future.result()
                done(number, results[number])
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise
    return results
