"""Small changes of source code that a good test suite notices: one operator, number or condition at a time."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_PASSED_OVER = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)
"""Messages, and what has no effect of its own."""


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        path: The file.
        line: Number of the line.
        start: First byte of what is replaced.
        stop: Byte behind it.
        new: What takes its place.
    """

    path: Path
    line: int
    start: int
    stop: int
    new: str

    def apply(self, source: bytes) -> bytes:
        """Returns the changed file.

        Examples:
            >>> [Mutant(Path("a.py"), 1, 4, 9, "(a - b)").apply(b"c = a + b")]
            [b'c = (a - b)']
        """
        return source[: self.start] + self.new.encode() + source[self.stop :]

    @property
    def source_line(self) -> str:
        """The line as it is, without its margin."""
        return self.path.read_text().splitlines()[self.line - 1].strip()

    def __str__(self) -> str:
        """Says where it is and what it puts in place of what."""
        before = self.path.read_bytes()[self.start : self.stop].decode()
        return f"{self.path}:{self.line}: {' '.join(before.split())} -> {self.new}"


def mutants_of(path: Path) -> list[Mutant]:
    """Lists all mutants of a file, in the order of their places.

    Left out are annotations, docstrings, messages of errors, decorators, what only a type checker runs, and numbers
    that are the default of an argument or of a field: another would be another choice, and no defect.
    """
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def mutant(node: ast.expr | ast.stmt, new: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, stop = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(path, node.lineno, start, stop, new)

    found = [mutant(node, new) for node in _visited(ast.parse(source)) for new in _changes(node)]
    return sorted(set(found), key=lambda one: (one.start, one.stop, one.new))


def _visited(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yields the expressions and statements that are run."""
    if isinstance(node, _PASSED_OVER) or _is_string(node) or _is_for_types(node):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment", "slice"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (_holds_defaults(node, name) and isinstance(child, ast.Constant)):
                yield from _visited(child)


def _holds_defaults(node: ast.AST, name: str) -> bool:
    is_of_arguments = isinstance(node, ast.arguments) and name in ("defaults", "kw_defaults")
    return is_of_arguments or (isinstance(node, ast.AnnAssign) and name == "value")


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_for_types(node: ast.AST) -> bool:
    is_checked = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    is_alias = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias"
    return is_checked or is_alias


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    """Yields the texts that may take the place of a node; in brackets, so that what is around them binds as before."""
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
            changed = ast.BinOp(left, _ARITHMETIC[type(operator)](), right)
            yield f"({ast.unparse(changed)})"
        case ast.Compare(left, [operator], comparators) if type(operator) in _COMPARISONS:
            yield f"({ast.unparse(ast.Compare(left, [_COMPARISONS[type(operator)]()], comparators))})"
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(ast.USub() | ast.Not(), operand) if not isinstance(operand, ast.Constant):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield str(not value)
        case ast.Constant(int(value)):
            yield str(value + 1)
        case ast.Constant(float(value)):
            yield repr(2 * value if value else 1.0)
        case ast.IfExp(test, body, orelse):
            yield f"({ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse))})"
        case ast.Expr(ast.Call()) | ast.AugAssign():
            yield "pass"
        case _:
            pass
