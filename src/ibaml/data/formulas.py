"""Formulas such as ``score ~ ses + C(sector)``: columns of a table as features, for those who think in formulas.

The formula is read and evaluated by formulaic; what becomes of a column before that is what ``ibaml.data.columns``
says, but for categories, which are never missing or new. What splines and scalings found on the training tasks is kept
as numbers, and a stored formula is text in which nothing can be called but the functions that are named here.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ibaml.data.columns import Array, Column, typed
from ibaml.optional import require

FUNCTIONS = frozenset(
    "C I center scale standardize poly bs cs cr cc log log10 log2 exp exp10 exp2".split()  # noqa: SIM905
)
"""What a formula may call by name, as formulaic defines it."""

MEMBERS: Mapping[str, frozenset[str]] = {
    "np": frozenset("log log1p log2 log10 exp expm1 sqrt abs sin cos tan tanh sign minimum maximum clip".split()),  # noqa: SIM905
    "contr": frozenset("treatment sum SAS helmert diff poly".split()),  # noqa: SIM905
}
"""What it may use of numpy and of formulaic's codings of categories."""

_CONSTANT = "Intercept"
_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Attribute,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.expr_context,
)


class Formula(NamedTuple):
    """The right-hand side of a formula, read.

    Attributes:
        text: The formula as it was given.
        targets: Columns on its left-hand side.
        variables: Columns on its right-hand side, sorted.
        categories: Those of them that it calls categories, by ``C(...)``.
        state: What transformations such as splines found in training, by their text; numbers, text, lists and dicts.
    """

    text: str
    targets: tuple[str, ...]
    variables: tuple[str, ...]
    categories: tuple[str, ...]
    state: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """Returns the formula as JSON values."""
        return {"text": self.text, "state": _as_json(self.state, self.text)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any]) -> "Formula":
        """Builds again what ``settings`` described.

        Raises:
            ValueError: If the text is no formula, or calls what a formula may not.
        """
        return read_formula(settings["text"])._replace(state=_from_json(settings["state"]))


def read_formula(text: str) -> Formula:
    """Reads a formula.

    Args:
        text: Such as ``"score ~ ses + C(sector)"``; without ``~`` it is a right-hand side.

    Raises:
        ImportError: If formulaic is not installed.
        TypeError: If it is no text.
        ValueError: If it cannot be read, names no column, has more than columns on its left-hand side, or calls a
            function that it may not.

    Examples:
        >>> read_formula("score ~ ses + C(sector)")[1:4]
        (('score',), ('sector', 'ses'), ('sector',))
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"formula must be text such as 'score ~ ses + C(sector)', but is a {type(text).__name__}.")
    formulaic = require("formulaic", "formulaic", "formulas")
    try:
        read = formulaic.Formula(text)
    except formulaic.errors.FormulaicError as error:
        raise ValueError(
            f"formula {text!r} cannot be read: {error} Effects that differ from task to task have no notation of their "
            "own: each task has its own weights of all terms."
        ) from error
    left, right = (read.lhs, read.rhs) if hasattr(read, "lhs") else ((), read)
    targets = tuple(str(term) for term in left)
    if not all(
        factor.eval_method.value == "lookup" and len(term.factors) == 1 for term in left for factor in term.factors
    ):
        raise ValueError(
            f"formula {text!r} has {' + '.join(targets)} on its left-hand side; expected columns as they are: "
            "transform the column itself before, so that predictions are in its unit."
        )
    names, categories = set[str](), set[str]()
    for factor in {factor for term in right for factor in term.factors}:
        if factor.eval_method.value == "lookup":
            names.add(factor.expr)
        elif factor.eval_method.value == "python":
            found, called = _names(text, factor.expr)
            names, categories = names | found, categories | called
    if not names:
        raise ValueError(f"formula {text!r} names no column; expected at least one, such as 'score ~ ses'.")
    if overlap := sorted(names & set(targets)):
        raise ValueError(f"formula {text!r} has {', '.join(overlap)} on both sides: leave it out of one.")
    return Formula(text, targets, tuple(sorted(names)), tuple(sorted(categories)), {})


def fit_formula(formula: Formula, columns: Sequence[Column], tables: Sequence[tuple[str, Any]]) -> Formula:
    """Returns the formula with what its transformations found in the tables of all training tasks.

    Args:
        formula: As read.
        columns: What is known of its columns.
        tables: What messages call a table, and the table.

    Raises:
        ValueError: As of ``encode_formula``, or if a transformation keeps what cannot be stored.
    """
    state = _evaluate(formula, columns, tables).model_spec.transform_state
    # Kept as it will be read.
    return formula._replace(state=_from_json(_as_json(state, formula.text)))


def encode_formula(formula: Formula, columns: Sequence[Column], tables: Sequence[tuple[str, Any]]) -> list[Array]:
    """Returns the features of tables, float64, each ``[num_examples, num_features]``.

    A constant is left out: a head has its own.

    Args:
        formula: From ``fit_formula``.
        columns: What is known of its columns.
        tables: What messages call a table, and the table.

    Raises:
        TypeError: If a column holds something else than in training.
        ValueError: If a column is missing, a category has not been seen in training or is missing, or a term cannot be
            computed or is not finite.
    """
    matrix = _evaluate(formula, columns, tables)
    names = [name for name in matrix.columns if name != _CONSTANT]
    if not names:
        raise ValueError(f"formula {formula.text!r} has a constant alone: name at least one column.")
    values = matrix[names].to_numpy(dtype=np.float64)
    finite = np.isfinite(values)
    if not bool(finite.all()):
        row, place = (int(each) for each in np.argwhere(~finite)[0])
        raise ValueError(
            f"{names[place]!r} of formula {formula.text!r} is not finite in {(~finite[:, place]).sum()} rows, the "
            f"first is row {matrix.index[row]}: leave such rows out, or change the term."
        )
    ends = np.cumsum([len(table) for _, table in tables])
    return np.split(values, ends[:-1])


def _evaluate(formula: Formula, columns: Sequence[Column], tables: Sequence[tuple[str, Any]]) -> Any:
    formulaic = require("formulaic", "formulaic", "formulas")
    frame = typed(columns, tables)
    spec = formulaic.ModelSpec(
        formula=_right_hand_side(formulaic.Formula(formula.text)),
        # A copy: formulaic writes into it.
        transform_state=_from_json(_as_json(formula.state, formula.text)),
        na_action="ignore",
    )
    try:
        # What is not finite is refused by name.
        with np.errstate(all="ignore"):
            return spec.get_model_matrix(frame, context={})
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"formula {formula.text!r} cannot be computed: {cause}") from error


def _right_hand_side(formula: Any) -> Any:
    return formula.rhs if hasattr(formula, "rhs") else formula


def _names(text: str, expression: str) -> tuple[set[str], set[str]]:
    """Returns the columns that an expression names, and those that it calls categories.

    Raises:
        ValueError: If it does something else than calling known functions.
    """
    try:
        parsed = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"formula {text!r} has {expression!r}, which cannot be read: names with spaces stand for themselves only, "
            "so rename the column."
        ) from error
    functions, names, categories = set[ast.AST](), set[str](), set[str]()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            functions.add(node.func)
            if node.func.id not in FUNCTIONS:
                raise ValueError(_refusal(text, node.func.id))
            if node.func.id == "C" and node.args and isinstance(node.args[0], ast.Name):
                categories.add(node.args[0].id)
        elif isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            functions.add(node.value)
            if node.attr not in MEMBERS.get(base, ()):
                raise ValueError(_refusal(text, ast.unparse(node)))
    for node in ast.walk(parsed):
        if not isinstance(node, _NODES):
            raise ValueError(_refusal(text, expression))
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name | ast.Attribute):
            raise ValueError(_refusal(text, expression))
        if isinstance(node, ast.Name) and node not in functions:
            names.add(node.id)
    return names, categories


def _refusal(text: str, what: str) -> str:
    members = ", ".join(f"{base}.{name}" for base, known in MEMBERS.items() for name in sorted(known))
    return (
        f"formula {text!r} has {what!r}, but a formula can only do arithmetic and call {', '.join(sorted(FUNCTIONS))}, "
        f"{members}: make a column of it before."
    )


def _as_json(value: Any, text: str) -> Any:
    """Returns the state of transformations as JSON values; a dict as pairs, because its keys may be numbers.

    Raises:
        ValueError: If there is something else than numbers, text, lists and dicts of them.
    """
    if isinstance(value, Mapping):
        return {"pairs": [[_as_json(key, text), _as_json(each, text)] for key, each in value.items()]}
    if isinstance(value, list | tuple | np.ndarray):
        return [_as_json(each, text) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"formula {text!r} has a transformation that keeps a {type(value).__name__} of the training tasks, which "
        "cannot be stored: make a column of it before."
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {_from_json(key): _from_json(each) for key, each in value["pairs"]}
    return [_from_json(each) for each in value] if isinstance(value, list) else value
