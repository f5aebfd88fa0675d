"""Arithmetic over columns, `N=params*1e6` or `loss=1-acc`, for tables in other names and units."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling.tables.readers import ScalingError

OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS = {"log": np.log, "exp": np.exp, "log2": np.log2, "sqrt": np.sqrt}
LONGEST = 1000  # characters of an expression
QUOTED = re.compile(r"`([^`]+)`")


def formula(text: str) -> tuple[ast.expr, dict[str, str]]:
    """An expression, and the column that each of its names stands for; columns whose names are no Python names stand
    in backquotes. Raises ScalingError on anything but numbers, columns, + - * / ** and log, exp, log2, sqrt."""
    names: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        names[f"column_{len(names)}"] = match[1]
        return f" column_{len(names) - 1} "

    try:
        if len(text) > LONGEST:
            raise ValueError("too long")
        tree = ast.parse(QUOTED.sub(named, text).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ScalingError(f"{text!r} is neither a column nor arithmetic over columns") from error
    # Python's parser, but not its evaluator: what is allowed is listed, so that a formula from a stranger's command
    # line can call nothing.
    functions = set()
    for node in ast.walk(tree):
        called = is_call(node)
        functions |= {id(node.func)} if called and isinstance(node, ast.Call) else set()
        known = (ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, *OPERATORS)
        if not (called or isinstance(node, known) or is_number(node)):
            raise ScalingError(f"{text!r} may hold numbers, columns, + - * / ** and {', '.join(FUNCTIONS)}")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions}
    return tree, {name: names.get(name, name) for name in used}


def is_call(node: ast.AST) -> bool:
    """Whether a node calls one of the functions with one argument."""
    known = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
    return known and isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords


def is_number(node: ast.AST) -> bool:
    """Whether a node is a number that fits a float."""
    value = node.value if isinstance(node, ast.Constant) else None
    return type(value) is float or (type(value) is int and abs(value) < 10**300)


def evaluated(tree: ast.AST, values: Mapping[str, float]) -> float:
    """The expression for one row; division by zero and logarithms of nothing are NaN or infinite, as in NumPy."""
    with np.errstate(all="ignore"):
        if isinstance(tree, ast.Constant):
            return float(tree.value)  # type: ignore[arg-type]
        if isinstance(tree, ast.Name):
            return values[tree.id]
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return float(FUNCTIONS[tree.func.id](evaluated(tree.args[0], values)))
        if isinstance(tree, ast.UnaryOp):
            return float(OPERATORS[type(tree.op)](evaluated(tree.operand, values)))
        assert isinstance(tree, ast.BinOp)
        left, right = (np.float64(evaluated(side, values)) for side in (tree.left, tree.right))
        return float(OPERATORS[type(tree.op)](left, right))
