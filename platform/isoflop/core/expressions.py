"""Formulas that users write: laws, costs and derived columns, as safe, differentiable expressions on arrays.

A text such as ``"E + A*N**-alpha + B*D**-beta"`` is parsed by Python's own parser into a syntax tree, of which only
numbers, names, ``+ - * / **`` and a short list of functions are accepted; nothing is ever evaluated as code. The tree
becomes a graph in which equal sub-expressions are one node, so that ``N**-alpha`` is computed once for a value and all
of its derivatives, and in which a power with a variable exponent is ``exp(exponent * log(base))``, so that ``log(N)``
is computed once per data set.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from isoflop.core.errors import UserError, unknown

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
MAX_TEXT = 4000


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _leq(a: Array, b: Array) -> Array:
    return np.less_equal(a, b).astype(np.float64)


_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "sign": np.sign,
    "expm1": np.expm1,
    "softplus": _softplus,
    "sigmoid": _sigmoid,
}
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "mul": np.multiply,
    "div": np.divide,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "leq": _leq,
}
FUNCTIONS = ("abs", "exp", "expm1", "log", "max", "min", "sigmoid", "softplus", "sqrt")
RECORDS = ("metrics", "footprint")
"""Columns that hold numbers by name; ``footprint.train_tokens`` is one of these numbers, and a name like any other."""
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Pow: "pow",
}


class Graph:
    """Hash-consed expression nodes; a node's operands always have smaller numbers than the node."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, ...]] = []
        self._index: dict[tuple[Any, ...], int] = {}
        self._diffs: dict[tuple[int, str], int] = {}
        self._names: dict[int, frozenset[str]] = {}

    def _add(self, *node: Any) -> int:
        if node not in self._index:
            self._index[node] = len(self.nodes)
            self.nodes.append(node)
        return self._index[node]

    def const(self, value: float) -> int:
        """A number."""
        return self._add("const", float(value))

    def name(self, name: str) -> int:
        """A free name."""
        return self._add("name", name)

    def value(self, node: int) -> float | None:
        """The number that a node is, or None."""
        return self.nodes[node][1] if self.nodes[node][0] == "const" else None

    def binary(self, op: str, a: int, b: int) -> int:
        """``a op b`` with the trivial cases folded (x+0, x*1, x*0, x**1, number op number)."""
        x, y = self.value(a), self.value(b)
        if op == "sub":
            return self.binary("add", a, self.unary("neg", b))
        if x is not None and y is not None:
            with np.errstate(all="ignore"):
                return self.const(float(_BINARY[op](np.asarray(x), np.asarray(y))))
        if op == "add":
            if x == 0 or y == 0:
                return b if x == 0 else a
            a, b = min(a, b), max(a, b)
        elif op == "mul":
            if x == 0 or y == 0:
                return self.const(0)
            if x == 1 or y == 1:
                return b if x == 1 else a
            if x == -1 or y == -1:
                return self.unary("neg", b if x == -1 else a)
            a, b = min(a, b), max(a, b)
        elif op == "div" and (x == 0 or y == 1):
            return a
        elif op == "pow":
            if y == 0:
                return self.const(1)
            if y == 1:
                return a
            if y is None:
                return self.unary("exp", self.binary("mul", b, self.unary("log", a)))
        return self._add(op, a, b)

    def unary(self, op: str, a: int) -> int:
        """A function of one node."""
        x = self.value(a)
        if x is not None:
            with np.errstate(all="ignore"):
                return self.const(float(_UNARY[op](np.asarray(x))))
        if op == "neg" and self.nodes[a][0] == "neg":
            return int(self.nodes[a][1])
        if op == "log" and self.nodes[a][0] == "exp":
            return int(self.nodes[a][1])
        return self._add(op, a)

    def names(self, node: int) -> frozenset[str]:
        """The free names below a node."""
        if node not in self._names:
            kind, *args = self.nodes[node]
            if kind == "name":
                self._names[node] = frozenset(args)
            elif kind == "const":
                self._names[node] = frozenset()
            else:
                self._names[node] = frozenset().union(*(self.names(a) for a in args))
        return self._names[node]

    def diff(self, node: int, name: str) -> int:
        """The derivative of a node with respect to a name (kinks of min, max and abs take one side)."""
        if name not in self.names(node):
            return self.const(0)
        key = (node, name)
        if key not in self._diffs:
            self._diffs[key] = self._derive(node, name)
        return self._diffs[key]

    def _derive(self, node: int, name: str) -> int:
        kind, *args = self.nodes[node]
        mul, add = (lambda a, b: self.binary("mul", a, b)), (lambda a, b: self.binary("add", a, b))
        if kind == "name":
            return self.const(1)
        d = [self.diff(a, name) for a in args]
        a, da = args[0], d[0]
        if kind in _UNARY:
            return mul(da, self._slope(kind, node, a))
        b, db = args[1], d[1]
        if kind == "add":
            return add(da, db)
        if kind == "mul":
            return add(mul(da, b), mul(a, db))
        if kind == "div":
            return self.binary("div", self.binary("sub", da, mul(node, db)), b)
        if kind == "pow":  # a number in the exponent: variable exponents have become exp(b*log(a))
            power = self.value(b) or 0.0
            return mul(da, mul(b, self.binary("pow", a, self.const(power - 1))))
        first = self._add("leq", *((a, b) if kind == "min" else (b, a)))
        return add(mul(first, da), mul(self.binary("sub", self.const(1), first), db))

    def _slope(self, kind: str, node: int, a: int) -> int:
        one = self.const(1)
        return {
            "neg": lambda: self.const(-1),
            "exp": lambda: node,
            "log": lambda: self.binary("div", one, a),
            "sqrt": lambda: self.binary("div", self.const(0.5), node),
            "abs": lambda: self._add("sign", a),
            "sign": lambda: self.const(0),
            "expm1": lambda: self.unary("exp", a),
            "softplus": lambda: self.unary("sigmoid", a),
            "sigmoid": lambda: self.binary("mul", node, self.binary("sub", one, node)),
        }[kind]()


class Program:
    """Several nodes of a graph, ready to be evaluated together on numpy arrays that broadcast."""

    def __init__(self, graph: Graph, outputs: Iterable[int]) -> None:
        self.graph = graph
        self.outputs = list(outputs)
        needed: set[int] = set()
        stack = list(self.outputs)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                kind, *args = graph.nodes[node]
                stack.extend(() if kind in ("const", "name") else args)
        self.order = sorted(needed)
        self._closures: dict[frozenset[str], list[int]] = {}

    def bind(
        self, values: Mapping[str, Array], known: Mapping[int, Array] | None = None, given: Iterable[str] = ()
    ) -> dict[int, Array]:
        """All nodes that depend on ``values`` alone, evaluated once, to be handed to ``run``.

        ``known`` and ``given``: nodes that were bound before, and the names they were bound to.
        """
        names = frozenset(values) | frozenset(given)
        cell: dict[int, Array] = dict(known or {})
        with np.errstate(all="ignore"):
            for node in self._closed(names):
                if node not in cell:
                    cell[node] = self._step(node, cell, values)
        return cell

    def _closed(self, names: frozenset[str]) -> list[int]:
        """Nodes that depend on something, and on nothing but ``names``."""
        if names not in self._closures:
            found = [n for n in self.order if self.graph.names(n) and self.graph.names(n) <= names]
            self._closures[names] = found
        return self._closures[names]

    def run(self, values: Mapping[str, Array], known: Mapping[int, Array] | None = None) -> list[Array]:
        """The outputs, in order; invalid operations give nan or inf, never an exception."""
        cell: dict[int, Array] = dict(known or {})
        with np.errstate(all="ignore"):
            for node in self.order:
                if node not in cell:
                    cell[node] = self._step(node, cell, values)
        return [cell[o] for o in self.outputs]

    def _step(self, node: int, cell: Mapping[int, Array], values: Mapping[str, Array]) -> Array:
        kind, *args = self.graph.nodes[node]
        if kind == "const":
            return np.float64(args[0])  # type: ignore[return-value]
        if kind == "name":
            return values[args[0]]
        operands = [self._operand(a, cell, values) for a in args]
        return _UNARY[kind](*operands) if kind in _UNARY else _BINARY[kind](*operands)

    def _operand(self, node: int, cell: Mapping[int, Array], values: Mapping[str, Array]) -> Array:
        found = cell.get(node)
        return self._step(node, cell, values) if found is None else found


class Expression:
    """A parsed formula. Call it with one array (or number) per free name."""

    def __init__(self, graph: Graph, root: int, text: str) -> None:
        self.graph, self.root, self.text = graph, root, text
        self.names = graph.names(root)

    def __call__(self, values: Mapping[str, Any]) -> Array:
        """Evaluate in float64; arrays broadcast. Raises UserError for a name without a value."""
        missing = sorted(self.names - set(values))
        if missing:
            raise unknown(f"name in {self.text!r}", missing[0], values)
        arrays = {n: np.asarray(values[n], dtype=np.float64) for n in self.names}
        return np.asarray(Program(self.graph, [self.root]).run(arrays)[0], dtype=np.float64)

    def derivative(self, name: str) -> Expression:
        """The exact derivative with respect to a name."""
        return Expression(self.graph, self.graph.diff(self.root, name), f"d({self.text})/d{name}")

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


def parse(text: str, where: str = "expression", graph: Graph | None = None) -> Expression:
    """``text`` as an expression.

    Args:
        text: numbers, names, ``+ - * / **``, parentheses and the functions in ``FUNCTIONS``.
        where: what the text is ("cost", "law", "--map N"), for the error's one line.
        graph: the graph to add to, so that several expressions share nodes.

    Raises:
        UserError: for anything else, with what is allowed.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: an expression is needed, got {text!r}")
    if len(text) > MAX_TEXT:
        raise UserError(f"{where}: the expression has {len(text)} characters; allowed: {MAX_TEXT}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise UserError(f"{where}: {text!r} is not an expression ({reason})") from None
    graph = Graph() if graph is None else graph
    try:
        return Expression(graph, _convert(tree.body, graph, text, where), text.strip())
    except RecursionError:
        raise UserError(f"{where}: the expression is nested too deeply") from None


def _convert(node: ast.expr, graph: Graph, text: str, where: str) -> int:
    def go(part: ast.expr) -> int:
        return _convert(part, graph, text, where)

    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        try:
            return graph.const(float(node.value))  # type: ignore[arg-type]
        except OverflowError:
            raise UserError(f"{where}: a number in {text!r} is too large") from None
    if isinstance(node, ast.Name):
        return graph.name(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in RECORDS:
        return graph.name(f"{node.value.id}.{node.attr}")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return graph.unary("neg", go(node.operand)) if isinstance(node.op, ast.USub) else go(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return graph.binary(_OPERATORS[type(node.op)], go(node.left), go(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in FUNCTIONS:
            raise unknown(f"function in {text!r}", node.func.id, FUNCTIONS, where)
        wanted = 2 if node.func.id in ("min", "max") else 1
        if node.keywords or len(node.args) != wanted or any(isinstance(a, ast.Starred) for a in node.args):
            raise UserError(f"{where}: {node.func.id}() takes {wanted} argument(s) in {text!r}")
        args = [go(a) for a in node.args]
        return graph.unary(node.func.id, args[0]) if wanted == 1 else graph.binary(node.func.id, args[0], args[1])
    shown = ast.get_source_segment(text.strip(), node) or type(node).__name__
    raise UserError(
        f"{where}: {shown!r} is not allowed in {text!r}; allowed: numbers, names, + - * / **, {', '.join(FUNCTIONS)}"
    )
