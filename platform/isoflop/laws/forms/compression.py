"""Laws of compression: precision, post-training quantization, activation sparsity, effective parameters."""

from __future__ import annotations

import math

from isoflop.laws.base import LAWS, LawForm, Parameter, Variable
from isoflop.laws.forms.classic import D, N
from isoflop.laws.forms.common import coefficient, exponent, floor, positive

_BITS = {"w": "weights", "a": "activations", "kv": "the KV cache"}

LAWS.register("precision")(
    LawForm(
        name="precision",
        formula="E + A*(N*(-expm1(-P_w/g_w))*(-expm1(-P_a/g_a))*(-expm1(-P_kv/g_kv)))**-alpha + B*D**-beta",
        variables=(N, D, *(Variable(f"P_{k}", "bits", rescale=False, doc=f"bits of {v}") for k, v in _BITS.items())),
        parameters=(
            floor(),
            coefficient("A"),
            coefficient("B"),
            exponent("alpha"),
            exponent("beta"),
            *(positive(f"g_{k}", 0.3, 10.0, "bits", f"sensitivity to the bits of {v}") for k, v in _BITS.items()),
        ),
        natural={"A": "A*u_N**alpha", "B": "B*u_D**beta"},
        asymptote="E",
        search_points=8192,
        starts=24,
        source="Kumar et al. 2024, arXiv 2411.04330",
        doc="Each kind of bits multiplies the effective parameter count; infinite bits give the additive law.",
    )
)

LAWS.register("ptq_penalty")(
    LawForm(
        name="ptq_penalty",
        formula="C_T*D**g_D*N**-g_N*exp(-P/g_P)",
        variables=(N, D, Variable("P", "bits", rescale=False, doc="bits after training")),
        parameters=(
            coefficient("C_T"),
            Parameter("g_D", -3.0, 5.0, search=(0.05, 2.0)),
            Parameter("g_N", -3.0, 5.0, search=(0.05, 2.0)),
            positive("g_P", 0.1, 10.0, "bits"),
        ),
        natural={"C_T": "C_T*u_N**g_N*u_D**-g_D"},
        search_points=4096,
        starts=16,
        source="Kumar et al. 2024, arXiv 2411.04330 (post-training penalty)",
        doc="Grows with training tokens: over-trained models lose more under quantization.",
    )
)

_B = Variable("D", "1e9 tokens", doc="training tokens, in billions")

LAWS.register("sparsing_silu")(
    LawForm(
        name="sparsing_silu",
        formula="A0 - c*D**-alpha",
        variables=(_B,),
        parameters=(floor("A0"), coefficient("c"), exponent("alpha")),
        natural={"c": "c*u_D**alpha"},
        asymptote="A0",
        search_points=96,
        source="Sparsing Law, arXiv 2411.02335 (SiLU): activation ratio rises to A0",
    )
)

LAWS.register("sparsing_relu")(
    LawForm(
        name="sparsing_relu",
        formula="A0 + exp_b*exp(-c*D**alpha)",
        variables=(_B,),
        parameters=(floor("A0"), coefficient("exp_b"), positive("c", 1e-4, 30.0), exponent("alpha")),
        natural={"c": "c*u_D**-alpha"},
        asymptote="A0",
        derived={"b": "log(exp_b)"},
        search_points=2304,
        starts=16,
        source="Sparsing Law, arXiv 2411.02335 (ReLU): activation ratio falls to A0",
    )
)

LAWS.register("linear_flat")(
    LawForm(
        name="linear_flat",
        formula="a + b*min(r, r0)",
        variables=(Variable("r", doc="any one size, e.g. width over depth"),),
        parameters=(
            Parameter("a", -math.inf, math.inf, linear=True, unit="unit of y", doc="value at r = 0"),
            Parameter("b", -math.inf, math.inf, linear=True, unit="unit of y", doc="slope before the bottleneck"),
            positive("r0", 0.2, 5.0, "unit of r", "bottleneck: what lies beyond makes no difference"),
        ),
        natural={"b": "b/u_r", "r0": "r0*u_r"},
        asymptote="a + b*r0",
        search_points=512,
        starts=12,
        source="Sparsing Law, arXiv 2411.02335, section 5: limits of the activation ratio against width over depth",
        doc="Two straight pieces. A bottleneck beyond all points, or before all of them, is not identified.",
    )
)

LAWS.register("eff_params")(
    LawForm(
        name="eff_params",
        formula="E + A*(N*r**kappa)**-alpha + B*D**-beta",
        variables=(N, D, Variable("r", rescale=False, doc="kept ratio in (0, 1]; 1 is uncompressed")),
        parameters=(
            floor(),
            coefficient("A"),
            coefficient("B"),
            exponent("alpha"),
            exponent("beta"),
            Parameter("kappa", 0.0, 10.0, search=(0.05, 3.0), doc="a ratio r counts as r^kappa of the parameters"),
        ),
        natural={"A": "A*u_N**alpha", "B": "B*u_D**beta"},
        asymptote="E",
        derived={"eff(1/2)": "0.5**kappa", "eff(1/4)": "0.25**kappa"},
        search_points=4096,
        starts=16,
        source="Frantar et al. 2025, arXiv 2502.16440 (effective parameter multiplier)",
        doc="eff(r) = r^kappa: identity at r = 1; fit `by: [method]` to compare methods by eff at equal bytes.",
    )
)
