"""Power laws in sizes: one variable, sums, products, and the baseline without any asymptote."""

from __future__ import annotations

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable
from isoflop.laws.forms.common import coefficient, exponent, floor

N = Variable("N", doc="model size, e.g. non-embedding parameters")
D = Variable("D", doc="training tokens")
V = Variable("V", doc="visual tokens that enter the language model")

LAWS.register("power")(
    LawForm(
        name="power",
        formula="E + A*N**-alpha",
        variables=(N,),
        parameters=(floor(), coefficient("A"), exponent("alpha")),
        natural={"A": "A*u_N**alpha"},
        asymptote="E",
        search_points=96,
        source="classic",
    )
)

LAWS.register("semilog")(
    LawForm(
        name="semilog",
        formula="E - a*log(N) - b*log(V)",
        variables=(N, V),
        parameters=(Parameter("E", linear=True), Parameter("a", linear=True), Parameter("b", linear=True)),
        natural={"E": "E + a*log(u_N) + b*log(u_V)"},
        derived={"a/b": "a/b"},
        search_points=1,
        starts=1,
        source="baseline without an asymptote",
        doc="Straight lines in ln N and ln V; often wins on narrow ranges, and says that no floor is visible.",
    )
)

LAWS.register("chinchilla")(
    LawForm(
        name="chinchilla",
        formula="E + A*N**-alpha + B*D**-beta",
        variables=(N, D),
        parameters=(floor(), coefficient("A"), coefficient("B"), exponent("alpha"), exponent("beta")),
        natural={"A": "A*u_N**alpha", "B": "B*u_D**beta"},
        asymptote="E",
        derived={
            "a_N": "beta/(alpha + beta)",
            "a_D": "alpha/(alpha + beta)",
            "G": "(alpha*A/(beta*B))**(1/(alpha + beta))",
        },
        source="Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
        doc="The additive law. N* = G (C/6)^a_N and D* = (C/6)^a_D / G for C = 6 N D.",
    )
)

LAWS.register("product")(
    LawForm(
        name="product",
        formula="E + A*N**-alpha*V**-beta",
        variables=(N, V),
        parameters=(floor(), coefficient("A"), exponent("alpha"), exponent("beta")),
        natural={"A": "A*u_N**alpha*u_V**beta"},
        asymptote="E",
        derived={"alpha/beta": "alpha/beta"},
        source="arXiv 2411.03312 (inference-optimal VLMs), equation 2",
        doc="E is the floor that the paper calls D. For cost 2N(Q+V): V* = beta Q/(alpha - beta) when alpha > beta.",
    )
)

LAWS.register("kaplan")(
    LawForm(
        name="kaplan",
        formula="((N_c/N)**(a_N/a_D) + D_c/D)**a_D",
        variables=(N, D),
        parameters=(
            Parameter("N_c", 1e-300, 1e300, search=(1e-2, 1e8), scale="log", unit="unit of N"),
            Parameter("D_c", 1e-300, 1e300, search=(1e-2, 1e8), scale="log", unit="unit of D"),
            Parameter("a_N", 1e-6, 10.0, search=(0.02, 1.0)),
            Parameter("a_D", 1e-6, 10.0, search=(0.02, 1.0)),
        ),
        natural={"N_c": "N_c*u_N", "D_c": "D_c*u_D"},
        asymptote="0",
        derived={"a_N/a_D": "a_N/a_D"},
        search_points=4096,
        starts=24,
        source="Kaplan et al. 2020, arXiv 2001.08361, equation 1.5",
        doc="No irreducible term: bends too late; a baseline.",
    )
)
