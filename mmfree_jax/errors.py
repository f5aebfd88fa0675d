"""What becomes of an exception: its own sentence for those that we raise, a traceback on file for all others."""

import contextlib
import linecache
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

OURS = Path(__file__).parents[1]
PACKAGES = ("mmfree_jax", "scaling", "launch")


def is_explained(error: BaseException) -> bool:
    """Whether an exception's message is written for users: our own types, whatever our code raises on purpose, and
    what the system says of a file."""
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return True
    return (isinstance(error, OSError) and error.filename is not None) or _raised_by_us(error.__traceback__)


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is at a `raise` of these packages: `{}["optimizer"]` in them is none."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    path = Path(trace.tb_frame.f_code.co_filename)
    own = path.is_relative_to(OURS) and path.relative_to(OURS).parts[0].removesuffix(".py") in PACKAGES
    return own and linecache.getline(str(path), trace.tb_lineno).lstrip().startswith("raise ")


def sentence(error: BaseException) -> str:
    """An exception in one line; its type stands before a message that may say little."""
    text = " ".join(str(error).split())
    if is_explained(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def reported(error: Exception) -> str:
    """`sentence`, and where the traceback of an exception that is not explained has been written."""
    if is_explained(error):
        return sentence(error)
    place = getattr(error, "written_to", None) or _to_temporary_file(error)
    return f"{sentence(error)} (traceback: {place}; --debug shows it)"


@contextlib.contextmanager
def logged(log: Path, but: type[Exception]) -> Iterator[None]:
    """An exception, but for one kind, passes with a line in `log`, and its traceback there if it is not explained.

    Only for a log that this process alone writes.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk has its own error
            file.write(f"ended by {type(error).__name__}: {' '.join(str(error).split())}\n")
            if not is_explained(error):
                file.write("".join(traceback.format_exception(error)))
                error.written_to = log  # type: ignore[attr-defined]
        raise


def _to_temporary_file(error: Exception) -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="mmfree-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    return Path(file.name)
