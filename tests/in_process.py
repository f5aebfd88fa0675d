"""Commands without a process of their own, which takes a second to start: for tests of what they say and answer."""

import contextlib
import io
import subprocess
from collections.abc import Callable


def called(main: Callable[[list[str]], int], *arguments: object) -> subprocess.CompletedProcess:
    """The exit status of `main` for these arguments, and what it prints on both streams."""
    texts = [str(argument) for argument in arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(texts)
        except SystemExit as ended:  # of an argument parser
            status = ended.code or 0
    return subprocess.CompletedProcess(texts, status, *(stream.buffer.getvalue().decode() for stream in (out, err)))
