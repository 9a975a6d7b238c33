"""Broken neural scaling laws: power laws whose exponent changes smoothly at break points."""

from __future__ import annotations

import math

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable
from isoflop.laws.forms.common import coefficient, positive


def broken_law(breaks: int) -> LawForm:
    """The form with a given number of breaks, computed in logarithms.

    A break i at d_i of sharpness f_i (small is sharp) adds c_i to the slope of ln(y - a) beyond it. Needs about
    3 * breaks + 3 well-placed points, some of them after every break.
    """
    terms = "".join(f" - c{i}*f{i}*softplus((log(x) - log(d{i}))/f{i})" for i in range(1, breaks + 1))
    parameters = [
        Parameter("a", -math.inf, math.inf, linear=True, unit="unit of y", doc="asymptote"),
        coefficient("b"),
        Parameter("c0", -10.0, 10.0, search=(0.005, 2.0), doc="slope before the first break"),
    ]
    for i in range(1, breaks + 1):
        parameters += [
            Parameter(f"c{i}", -100.0, 100.0, search=(0.05, 10.0), doc="change of slope"),
            positive(f"d{i}", 0.2, 5.0, "unit of x", "place of the break"),
            Parameter(f"f{i}", 1e-4, 20.0, search=(0.02, 1.0), scale="log", doc="width of the break"),
        ]
    total = " + ".join(f"c{i}" for i in range(breaks + 1))
    return LawForm(
        name="bnsl" if breaks == 1 else f"bnsl{breaks}",
        formula=f"a + b*exp(-c0*log(x){terms})",
        variables=(Variable("x", doc="any one size"),),
        parameters=tuple(parameters),
        natural={"b": "b*u_x**c0", **{f"d{i}": f"d{i}*u_x" for i in range(1, breaks + 1)}},
        asymptote="a",
        derived={"slope after the last break": total},
        exchangeable=tuple((f"d{i}", f"c{i}", f"f{i}") for i in range(1, breaks + 1)) if breaks > 1 else (),
        search_points=8192,
        starts=48,
        source="Caballero et al. 2022, arXiv 2210.14891, equation 1",
        doc="A break cannot be predicted from points before it.",
    )


LAWS.register("bnsl")(broken_law(1))
LAWS.register("bnsl2")(broken_law(2))
