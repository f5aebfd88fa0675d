"""How a command reports an exception: its message, if it is written for users; else also a traceback, in a file."""

import contextlib
import importlib
import linecache
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

from mmfree_jax.config import ConfigError

OURS = Path(__file__).parents[1]
PACKAGES = ("mmfree_jax", "scaling", "launch")


def is_explained(error: BaseException) -> bool:
    """Return whether an exception's message is written for users.

    True for our own types, for what our code raises on purpose, and for the system's errors about a file.
    """
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return True
    return (isinstance(error, OSError) and error.filename is not None) or _raised_by_us(error.__traceback__)


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether a `raise` statement of these packages raised it, and not an expression such as `{}["optimizer"]`."""
    # The last frame is where the exception began; its source line tells a deliberate `raise` from an accident.
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    path = Path(trace.tb_frame.f_code.co_filename)
    own = path.is_relative_to(OURS) and path.relative_to(OURS).parts[0].removesuffix(".py") in PACKAGES
    return own and linecache.getline(str(path), trace.tb_lineno).lstrip().startswith("raise ")


def sentence(error: BaseException) -> str:
    """Return an exception in one line. The type comes first unless the message is written for users."""
    text = " ".join(str(error).split())
    if is_explained(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def describe(error: Exception) -> str:
    """Return an exception in one line, with the file of its traceback unless the message is written for users."""
    if is_explained(error):
        return sentence(error)
    # The log of a run has it already (`logged`); a second file would only be another place to look.
    place = getattr(error, "written_to", None)
    if place is None:
        with tempfile.NamedTemporaryFile("w", prefix="mmfree-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
        place = file.name
    return f"{sentence(error)} (traceback: {place}; --debug shows it)"


@contextlib.contextmanager
def logged(log: Path, ignored: type[Exception]) -> Iterator[None]:
    """Append a line to `log` for an exception inside the context, and its traceback if the message is not for users.

    Exceptions of the type `ignored` leave no line. No other process may write to the log.
    """
    try:
        yield
    except ignored:
        raise
    except Exception as error:
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk has its own error
            file.write(f"ended by {type(error).__name__}: {' '.join(str(error).split())}\n")
            if not is_explained(error):
                file.write("".join(traceback.format_exception(error)))
                error.written_to = log  # type: ignore[attr-defined]
        raise


def need(module: str, purpose: str, install: str) -> ModuleType:
    """Import an optional package. Raises ConfigError that says what needs it, and what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs a package that is not installed ({error}): pip install {install}") from None
