"""Sizes that keep the package readable: at most 300 lines a file, at most 60 a function without its docstring."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "aligner_middleware"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 300, 60


def length(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def function_lengths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = length(node.body[0]) if ast.get_docstring(node) else 0
            yield node.name, length(node) - docstring


def test_no_file_of_the_package_is_too_long() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > FILE_LINES} == {}


def test_no_function_of_the_package_is_too_long() -> None:
    too_long = {
        f"{path.relative_to(PACKAGE)}: {name}": count
        for path in FILES
        for name, count in function_lengths(ast.parse(path.read_text(encoding="utf-8")))
        if count > FUNCTION_LINES
    }
    assert too_long == {}
