"""Imports go down only: docs/architecture.md lists the layers of mmfree_jax, and every import follows that order."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = re.search(r"```layers\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.S)
assert LISTED
LAYERS = re.findall(r"^(\S+)", LISTED[1], re.M)


def layer(module: str) -> int:
    """The place in the list of the longest entry that a module lies under; mmfree_jax itself lies above all."""
    found = [name for name in LAYERS if f"{module}.".startswith(f"mmfree_jax.{name}.")]
    return LAYERS.index(max(found, key=len)) if found else len(LAYERS)


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_ = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return plain | {f"{node.module}.{alias.name}" for node in from_ for alias in node.names}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_import_of_mmfree_jax_goes_down_its_list_of_layers():
    files = sorted((ROOT / "mmfree_jax").rglob("*.py"))
    wrong = [
        f"{module(path)} imports {name}"
        for path in files
        for name in imports(path)
        if name.startswith("mmfree_jax.") and layer(name) > layer(module(path))
    ]
    assert wrong == []
    assert {layer(module(path)) for path in files} == {*range(len(LAYERS)), len(LAYERS)}  # the list names what exists


def test_scaling_imports_neither_jax_nor_the_trainer():
    for path in (ROOT / "scaling").rglob("*.py"):
        assert not {name.partition(".")[0] for name in imports(path)} & {"jax", "jaxlib", "flax", "mmfree_jax"}, path
