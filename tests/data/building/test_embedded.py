from pathlib import Path

import pytest

from mmfree_jax.data.building import embedded
from mmfree_jax.data.building.workers import WorkerError, run_parts
from tests.data.made_up import FILES, made_up_packages, write_package

LONG = "This is what the function does with the array and the value that is given to it. " * 4

SOURCE = f'''
"""Module.

{LONG}
"""
import sys

class Thing:
    """Class. {LONG}"""

    def method(self):
        """Method. {LONG}

        Below:
            indented
        """
        def inner():
            """Inner. {LONG}"""

if sys.version_info > (3,):
    try:
        async def conditional():
            r"""Conditional \\d. {LONG}"""
    except ImportError:
        def conditional():
            """Fallback. {LONG}"""

def short():
    """Too short to keep."""
    "not a docstring " + "{LONG}"
'''


def test_docstrings_come_in_source_order_cleaned_and_long_enough() -> None:
    found = embedded.extract(SOURCE.encode())
    assert [p.split(".")[0] for p in found.passages] == [
        "Module", "Class", "Method", "Inner", "Conditional \\d", "Fallback",
    ]  # fmt: skip
    assert found.passages[2].endswith("\n\nBelow:\n    indented")
    assert found.short_bytes == len("Too short to keep.")
    assert found.found_bytes == found.short_bytes + sum(len(p) for p in found.passages)


def test_unusual_sources_are_read_or_skipped() -> None:
    windows = SOURCE.replace("\n", "\r\n").encode()
    assert embedded.extract(windows).passages == embedded.extract(SOURCE.encode()).passages
    latin = f'# -*- coding: latin-1 -*-\n"""Caf\u00e9. {LONG}"""'.encode("latin-1")
    assert embedded.extract(latin).passages[0].startswith("Caf\u00e9.")
    assert embedded.extract(b"") == embedded.Extracted((), 0, 0, 0, True)
    python2 = f'"""{LONG}"""\nprint "no"'.encode()
    assert embedded.extract(python2) == embedded.Extracted((), 0, 0, 0, False)
    assert not embedded.extract(b'"""\xff\xfe"""').parsed
    surrogate = f'"""A lone \\ud800 surrogate. {LONG}"""'.encode()
    assert embedded.extract(surrogate).passages[0].startswith("A lone ? surrogate.")


def test_data_in_docstrings_is_left_out_and_counted() -> None:
    found = embedded.extract(('"""' + "0.25 1.50 3.75 | " * 40 + '"""').encode())
    assert found.passages == ()
    assert found.not_english_bytes == found.found_bytes > 600


def test_the_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    packages = made_up_packages(tmp_path)
    alone = embedded.extract_packages(packages, 1)
    assert embedded.extract_packages(packages, 3) == alone
    assert [len(files) for files in alone] == [FILES, FILES]


def test_a_failing_worker_is_reported_with_its_reason(tmp_path: Path) -> None:
    missing = write_package(tmp_path, "gone", {"a.py": b"", "b.py": b""})
    Path(missing.files[1][1]).unlink()
    with pytest.raises(WorkerError, match=r"FileNotFoundError.*b\.py"):
        embedded.extract_packages([missing], 2)
    assert run_parts("math", "fsum", [[1, 2], [3]]) == [3.0, 3.0]


def test_installed_packages_are_listed_without_tests_and_with_versions_and_licences() -> None:
    packages = {package.name: package for package in embedded.installed_packages()}
    assert set(embedded.REQUIRED) < set(packages)
    assert [(p.name, p.version) for p in packages.values()] == list(embedded.installed_versions().items())
    assert all(package.version and package.licence for package in packages.values())
    assert "BSD" in packages["scipy"].licence
    names = [name for package in packages.values() for name, _ in package.files]
    assert "scipy/optimize/_minimize.py" in names
    assert "python/argparse.py" in names
    assert not any("/tests/" in name or "site-packages" in name for name in names)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "REQUIRED", ("scipy", "no-such-package"))
    with pytest.raises(ModuleNotFoundError, match="pip install no-such-package"):
        embedded.installed_versions()
