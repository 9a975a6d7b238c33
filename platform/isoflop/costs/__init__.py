"""What a configuration costs: FLOPs per answer, bytes, and users' own formulas. Formulas here, measurements in the ledger."""

from isoflop.costs.flops import AnswerFlops, answer_flops, decode_flops, prefill_flops, projector_flops, vision_flops
from isoflop.costs.formulas import FORMULAS, add_cost, cost_of
from isoflop.costs.measured import MeasuredCost, measured_cost
from isoflop.costs.memory import kv_cache_bytes, peak_bytes, weight_bytes
from isoflop.costs.shapes import DecoderShape, VisionShape

__all__ = [
    "AnswerFlops",
    "DecoderShape",
    "FORMULAS",
    "MeasuredCost",
    "VisionShape",
    "add_cost",
    "answer_flops",
    "cost_of",
    "decode_flops",
    "kv_cache_bytes",
    "measured_cost",
    "peak_bytes",
    "prefill_flops",
    "projector_flops",
    "vision_flops",
    "weight_bytes",
]
