"""What all methods on vision-language models need: the model, or its description, as one of that kind."""

from __future__ import annotations

from isoflop.core.errors import Infeasible
from isoflop.models.base import Model, ModelInfo
from isoflop.models.vlm import VlmModel
from isoflop.models.vlm_info import VlmInfo


def vlm_info(info: ModelInfo) -> VlmInfo:
    """``info`` as that of a vision-language model; Infeasible otherwise."""
    if not isinstance(info, VlmInfo):
        raise Infeasible(f"model {info.ref} is no vision-language model: methods on visual tokens do not apply")
    return info


def vlm_model(model: Model) -> VlmModel:
    """``model`` as a vision-language model; Infeasible otherwise."""
    if not isinstance(model, VlmModel):
        raise Infeasible(f"model {model.info.ref} is no vision-language model: methods on visual tokens do not apply")
    return model
