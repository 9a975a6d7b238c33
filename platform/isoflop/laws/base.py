"""What a law is: a formula with named variables and parameters, from which everything else is derived.

A form is written once, as an expression. Its Jacobian is the symbolic derivative; a parameter is linear when the formula
is affine in it, and the linear parameters' derivatives are the basis functions of variable projection.

Shapes: B problems solved together, G data sets (groups), N points, P parameters, K linear and Q nonlinear parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from isoflop.core.errors import UserError, unknown
from isoflop.core.expressions import Array, Expression, Mask, Program, parse
from isoflop.core.registry import Registry

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Variable:
    """An input of a law.

    Attributes:
        name: as it stands in the formula.
        unit: what one unit of it is; the fit keeps whatever unit the column has.
        positive: values must be > 0 (a power of it is taken).
        rescale: the form is closed under a change of this variable's unit (see ``LawForm.natural``).
        doc: one line for people.
    """

    name: str
    unit: str = ""
    positive: bool = True
    rescale: bool = True
    doc: str = ""


@dataclass(frozen=True)
class Parameter:
    """A fitted number.

    Attributes:
        name: as it stands in the formula.
        low, high: bounds in natural units; a fit that ends on one of them says so.
        search: range that the global search covers (nonlinear parameters only), after sizes were divided by their
            geometric means.
        scale: ``log`` solves and searches for the logarithm (the parameter is positive and spans orders of magnitude).
        linear: the formula is affine in it, together with all other linear ones.
        unit, doc: for people.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    search: Bounds = (0.01, 2.0)
    scale: Literal["linear", "log"] = "linear"
    linear: bool = False
    unit: str = ""
    doc: str = ""


@dataclass(frozen=True)
class LawForm:
    """A parametric form y = f(variables; parameters).

    A new law is one of these, registered under a name (or offered by a package through the entry point group ``isoflop.laws``)::

        LAWS.register("saturating")(
            LawForm(
                name="saturating",
                formula="E + A/(1 + N/N_half)",
                variables=(Variable("N"),),
                parameters=(
                    Parameter("E", 0.0, linear=True),
                    Parameter("A", 0.0, linear=True),
                    Parameter("N_half", 1e-300, 1e300, search=(1e-2, 1e2), scale="log"),
                ),
                natural={"N_half": "N_half*u_N"},
            )
        )

    Attributes:
        name: its name in the registry.
        formula: the expression.
        variables, parameters: in the order of all arrays.
        natural: how parameters fitted on x / u (u the variables' scales, names ``u_<variable>``) turn into those for x;
            a parameter that is not listed stays as it is.
        asymptote: the limit as every size grows, an expression in the parameters; empty when the form has none.
        derived: quantities that matter more than the parameters, as expressions in the parameters.
        exchangeable: groups of parameters that may trade places (the breaks of a broken law); results come in ascending
            order of each group's first name.
        search_points: size of the global search's design; starts: how many of its cells are polished.
        source: paper and equation.
    """

    name: str
    formula: str
    variables: tuple[Variable, ...]
    parameters: tuple[Parameter, ...]
    natural: Mapping[str, str] = field(default_factory=dict)
    asymptote: str = ""
    derived: Mapping[str, str] = field(default_factory=dict)
    exchangeable: tuple[tuple[str, ...], ...] = ()
    search_points: int = 400
    starts: int = 8
    source: str = ""
    doc: str = ""

    @cached_property
    def variable_names(self) -> tuple[str, ...]:
        """Names of the variables, in order."""
        return tuple(v.name for v in self.variables)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.parameters)

    @cached_property
    def linear(self) -> tuple[int, ...]:
        """Positions of the linear parameters."""
        return tuple(i for i, p in enumerate(self.parameters) if p.linear)

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Positions of the nonlinear parameters."""
        return tuple(i for i, p in enumerate(self.parameters) if not p.linear)

    @cached_property
    def logarithmic(self) -> Mask:
        """Boolean (P,): solved for on a log scale."""
        return np.array([p.scale == "log" for p in self.parameters], dtype=bool)

    @cached_property
    def expression(self) -> Expression:
        """The parsed formula; raises UserError for a name that is neither a variable nor a parameter."""
        parsed = parse(self.formula, f"law {self.name!r}")
        known = {*self.variable_names, *self.names}
        for name in sorted(parsed.names - known):
            raise unknown(f"name in law {self.name!r}", name, known)
        for name in sorted(known - parsed.names):
            raise UserError(f"law {self.name!r}: {name!r} does not occur in {self.formula!r}")
        return parsed

    @cached_property
    def program(self) -> Program:
        """Value and the P derivatives, evaluated together."""
        tree = self.expression
        return Program(tree.graph, [tree.root, *(tree.graph.diff(tree.root, n) for n in self.names)])

    @cached_property
    def _value_program(self) -> Program:
        return Program(self.expression.graph, [self.expression.root])

    def bind(self, x: Mapping[str, Array]) -> dict[int, Array]:
        """What depends on the data alone (logarithms of sizes …), computed once; arrays (G, N)."""
        return self.program.bind({v: x[v] for v in self.variable_names})

    def evaluate(self, x: Mapping[str, Any], p_BP: Array) -> Array:
        """Predictions, shape = broadcast of p's leading axes with x: p (…, P) against x (N,) gives (…, N)."""
        values = {v: np.asarray(x[v], dtype=np.float64) for v in self.variable_names}
        params = np.asarray(p_BP, dtype=np.float64)
        values |= {n: params[..., i, None] for i, n in enumerate(self.names)}
        out = self._value_program.run(values)[0]
        return np.asarray(out[..., 0] if params.ndim == 1 and np.ndim(next(iter(values.values()))) == 0 else out)

    def value_and_jacobian(
        self, known: Mapping[int, Array], p_BP: Array, n: int, out: Array | None = None
    ) -> tuple[Array, Array]:
        """Predictions (B, N) and derivatives (B, P, N) for bound data (1, N) or (B, N) and parameters (B, P).

        ``out``: where to put the derivatives.
        """
        values = {name: p_BP[:, i, None] for i, name in enumerate(self.names)}
        f, *columns = self.program.run(values, known)
        f_BN = np.broadcast_to(f, (len(p_BP), n))
        j_BPN = np.empty((len(p_BP), len(self.names), n)) if out is None else out
        for k, column in enumerate(columns):
            j_BPN[:, k] = column
        return f_BN, j_BPN

    def separate(self, known: Mapping[int, Array], p_BP: Array, n: int) -> tuple[dict[int, Array], Array, Array]:
        """For variable projection: what depends on data and nonlinear parameters (bound), basis (B, K, N), offset (B, N)."""
        theta = {self.names[i]: p_BP[:, i, None] for i in self.nonlinear}
        bound = self.program.bind(theta, known, self.variable_names)
        zero = {self.names[i]: np.zeros((1, 1)) for i in self.linear}
        offset = np.broadcast_to(self._value_program.run({**theta, **zero}, bound)[0], (len(p_BP), n))
        basis = np.empty((len(p_BP), len(self.linear), n))
        for k, column in enumerate(self._basis_program.run(theta, bound)):
            basis[:, k] = column
        return bound, basis, offset

    @cached_property
    def _basis_program(self) -> Program:
        """The derivatives with respect to the linear parameters: functions of data and nonlinear parameters alone."""
        tree = self.expression
        return Program(tree.graph, [tree.graph.diff(tree.root, self.names[i]) for i in self.linear])

    def jacobian(self, x: Mapping[str, Any], p_P: Array) -> Array:
        """Derivatives (N, P) of the predictions at one parameter vector."""
        values = {v: np.atleast_1d(np.asarray(x[v], dtype=np.float64))[None] for v in self.variable_names}
        n = max(a.shape[1] for a in values.values())
        return self.value_and_jacobian(self.program.bind(values), np.asarray(p_P, dtype=np.float64)[None], n)[1][0].T

    def to_natural(self, p_BP: Array, scales: Mapping[str, Array | float]) -> Array:
        """Parameters for the data's own units from parameters fitted on data divided by ``scales`` (each (B,) or ())."""
        values: dict[str, Any] = {n: p_BP[:, i] for i, n in enumerate(self.names)}
        values |= {f"u_{v}": s for v, s in scales.items()}
        out = np.array(p_BP, dtype=np.float64)
        for name, text in self.natural.items():
            out[:, self.names.index(name)] = _parsed(text, f"law {self.name!r}, unit of {name}")(values)
        return out

    def canonical(self, p_BP: Array) -> Array:
        """Exchangeable groups in ascending order of their first parameter."""
        if not self.exchangeable:
            return p_BP
        places = np.array([[self.names.index(n) for n in group] for group in self.exchangeable])
        order = np.argsort(p_BP[:, places[:, 0]], axis=1, kind="stable")
        out = p_BP.copy()
        for k in range(len(places)):
            out[:, places[k]] = np.take_along_axis(p_BP, places[order[:, k]], axis=1)
        return out

    def position(self, name: str) -> int:
        """Where a parameter stands in all arrays; a UserError that names the nearest one otherwise."""
        if name not in self.names:
            raise unknown(f"parameter of law {self.name!r}", name, self.names)
        return self.names.index(name)

    def quantity(self, text: str, p_BP: Array) -> Array:
        """A derived quantity (an expression in the parameters) for every row of p."""
        return np.broadcast_to(
            _parsed(text, f"quantity of law {self.name!r}")({n: p_BP[:, i] for i, n in enumerate(self.names)}),
            (len(p_BP),),
        )


@lru_cache(maxsize=512)
def _parsed(text: str, where: str) -> Expression:
    return parse(text, where)


LAWS: Registry[LawForm] = Registry("law", ("isoflop.laws.forms",))


def linear_parameters(expression: Expression, names: list[str]) -> set[str]:
    """Parameters in which an expression is jointly affine, chosen greedily in the order given."""
    graph, chosen = expression.graph, set[str]()
    for name in names:
        slope = graph.diff(expression.root, name)
        if not graph.names(slope) & (chosen | {name}):
            chosen.add(name)
    return chosen


def custom_form(
    formula: str,
    variables: list[str] | tuple[str, ...],
    name: str = "custom",
    bounds: Mapping[str, Bounds] | None = None,
) -> LawForm:
    """A law from a user's expression: every free name that is not a variable is a parameter.

    Linear parameters are found from the formula. Bounds default to all numbers for linear parameters and to [-10, 10]
    for the others, whose search covers the given bounds, or [0.01, 2] where these are wider.

    Raises:
        UserError: for an expression that is not allowed, or one without parameters or without a variable.
    """
    parsed = parse(formula, f"law {name!r}")
    used = [v for v in variables if v in parsed.names]
    order = sorted(parsed.names - set(used), key=lambda n: (formula.find(n), n))
    if not used:
        raise UserError(
            f"law {name!r}: {formula!r} contains none of the variables {', '.join(variables) or '(none mapped)'}"
        )
    if not order:
        raise UserError(f"law {name!r}: {formula!r} has no parameters to fit")
    flat = linear_parameters(parsed, order)
    limits = dict(bounds or {})
    for given in limits:
        if given not in order:
            raise unknown(f"parameter of law {name!r}", given, order)

    def parameter(n: str) -> Parameter:
        low, high = limits.get(n, (-math.inf, math.inf) if n in flat else (-10.0, 10.0))
        narrow = math.isfinite(low) and math.isfinite(high) and n in limits
        return Parameter(n, low, high, search=(low, high) if narrow else (0.01, 2.0), linear=n in flat)

    return LawForm(
        name=name,
        formula=formula,
        variables=tuple(Variable(v, positive=False, rescale=False) for v in used),
        parameters=tuple(parameter(n) for n in order),
        search_points=400 if len(order) - len(flat) <= 2 else 2048,
        starts=8 if len(order) - len(flat) <= 2 else 16,
        source="user's expression",
    )


def resolve_form(law: str | LawForm, variables: list[str] | tuple[str, ...] = ()) -> LawForm:
    """A form by name, by expression (anything with an operator in it), or as it is."""
    if isinstance(law, LawForm):
        return law
    if law in LAWS or not any(c in law for c in "+-*/( "):
        return LAWS.get(law)
    return custom_form(law, variables)
