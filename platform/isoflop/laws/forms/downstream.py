"""Laws of downstream metrics: observational (sigmoid of capability) and coverage under repeated sampling."""

from __future__ import annotations

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable


def observational_law(components: int) -> LawForm:
    """A metric as a sigmoid of principal capability measures S1, S2, … with ceiling h."""
    names = [f"S{i}" for i in range(1, components + 1)]
    inner = " + ".join(f"w{i}*S{i}" for i in range(1, components + 1))
    return LawForm(
        name="observational" if components == 1 else f"observational{components}",
        formula=f"h*sigmoid({inner} + b)",
        variables=tuple(Variable(n, positive=False, rescale=False, doc="principal component") for n in names),
        parameters=(
            Parameter("h", 0.0, 1.0, linear=True, doc="ceiling of the metric"),
            *(Parameter(f"w{i}", -50.0, 50.0, search=(-3.0, 3.0)) for i in range(1, components + 1)),
            Parameter("b", -50.0, 50.0, search=(-5.0, 5.0)),
        ),
        asymptote="h",
        search_points=2048,
        starts=16,
        source="Ruan, Maddison, Hashimoto 2024, arXiv 2405.10938",
        doc="S from isoflop.laws.observational.capabilities; multiple-choice tasks need their chance level removed first.",
    )


LAWS.register("observational")(observational_law(1))
LAWS.register("observational3")(observational_law(3))

LAWS.register("coverage")(
    LawForm(
        name="coverage",
        formula="exp(a*k**b)",
        variables=(Variable("k", "samples", rescale=True, doc="samples per problem"),),
        parameters=(
            Parameter("a", -50.0, 0.0, search=(-5.0, -0.01)),
            Parameter("b", -5.0, 0.0, search=(-2.0, -0.01)),
        ),
        natural={"a": "a*u_k**-b"},
        asymptote="1",
        search_points=1024,
        starts=12,
        source="Brown et al. 2024, arXiv 2407.21787",
        doc="ln(-ln c) is a straight line in ln k; estimate c without bias first (isoflop.laws.coverage).",
    )
)
