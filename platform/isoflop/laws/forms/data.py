"""Laws of training data: repeated data, and exponents that depend on model size."""

from __future__ import annotations

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable
from isoflop.laws.forms.classic import D, N
from isoflop.laws.forms.common import coefficient, floor, positive

U = Variable("U", doc="unique training tokens, in the unit of D")

# Compute-optimal size for U unique tokens, U_N = (U G)^(beta/alpha) G, and what exceeds it counts for less and less.
_G = "((alpha*A)/(beta*B))**(1/(alpha + beta))"
_U_N = f"min(N, (min(U, D)*{_G})**(beta/alpha)*{_G})"
_R_N, _R_D = f"(N/({_U_N}) - 1)", "max(D/min(U, D) - 1, 0)"
_N_EFF = f"({_U_N})*(1 + R_N*(-expm1(-{_R_N}/R_N)))"
_D_EFF = f"min(U, D)*(1 + R_D*(-expm1(-{_R_D}/R_D)))"

LAWS.register("datacon")(
    LawForm(
        name="datacon",
        formula=f"E + A*({_N_EFF})**-alpha + B*({_D_EFF})**-beta",
        variables=(
            Variable("N", rescale=False, doc=N.doc),
            Variable("D", rescale=False, doc=D.doc),
            Variable("U", rescale=False, doc=U.doc),
        ),
        parameters=(
            floor(),
            Parameter("A", 1e-300, 1e300, search=(1e1, 1e4), scale="log", unit="unit of y"),
            Parameter("B", 1e-300, 1e300, search=(1e1, 1e5), scale="log", unit="unit of y"),
            Parameter("alpha", 1e-3, 3.0, search=(0.15, 0.7)),
            Parameter("beta", 1e-3, 3.0, search=(0.15, 0.7)),
            positive("R_D", 1.0, 100.0, doc="repetitions after which repeated tokens have lost 1 - 1/e of their value"),
            positive("R_N", 1.0, 100.0, doc="the same for parameters beyond the compute-optimal size"),
        ),
        asymptote="E",
        derived={"a_N": "beta/(alpha + beta)", "G": _G},
        search_points=4096,
        starts=20,
        source="Muennighoff et al. 2023, arXiv 2305.16264, equations 5-7",
        doc="N and D in absolute numbers. Best fitted in two stages: chinchilla on single-epoch runs, then R_D and R_N.",
    )
)

LAWS.register("farseer")(
    LawForm(
        name="farseer",
        formula="exp_S*exp(s*N**q) + exp_Q*exp(B*N**b)*D**(-exp(A*N**a + E))",
        variables=(N, Variable("D", rescale=False, doc=D.doc)),
        parameters=(
            coefficient("exp_S"),
            Parameter("s", -50.0, 50.0, search=(-2.0, 2.0)),
            Parameter("q", -3.0, 3.0, search=(-1.0, 1.0)),
            coefficient("exp_Q"),
            Parameter("B", -50.0, 50.0, search=(-2.0, 2.0)),
            Parameter("b", -3.0, 3.0, search=(-1.0, 1.0)),
            Parameter("A", -50.0, 50.0, search=(-1.0, 1.0)),
            Parameter("a", -3.0, 3.0, search=(-1.0, 1.0)),
            Parameter("E", -8.0, 4.0, search=(-3.0, 0.5)),
        ),
        natural={"s": "s*u_N**-q", "B": "B*u_N**-b", "A": "A*u_N**-a"},
        derived={"S": "log(exp_S)", "Q": "log(exp_Q)"},
        search_points=8192,
        starts=48,
        source="arXiv 2506.10972",
        doc="exp(S) and exp(Q) are fitted as amplitudes. Nine parameters: needs tens of points.",
    )
)
