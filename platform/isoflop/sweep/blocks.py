"""The blocks of a sweep's YAML: what each may hold, and the short forms in which people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Block(BaseModel):
    """Base class: unknown keys are refused, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _duration(value: Any) -> Any:
    """Seconds, from a number or from ``90s``, ``10m``, ``2h``, ``1d``."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|h|d)\s*", value)
        if not match:
            raise ValueError("must be a time: a number of seconds, or 90s, 10m, 2h, 1d")
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    return value


def _size(value: Any) -> Any:
    """Bytes, from a number or from ``512MB``, ``4GiB``."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKMGT])?(i)?B?\s*", value)
        if not match:
            raise ValueError("must be a size: a number of bytes, or 512MB, 4GiB")
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " kMGT".index((match[2] or " ").replace("K", "k")))
    return value


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("must be a number")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Seconds = Annotated[float, Field(gt=0), BeforeValidator(_duration)]
Bytes = Annotated[int, Field(gt=0), BeforeValidator(_size)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_number)]


class TargetBlock(Block):
    """What a search with the law sampler wants to know; each kind has its own keys."""

    kind: Literal["allocation", "frontier", "prediction", "best-method", "exponents"] = Field(
        description="V* or N* at a budget; errors along a range of budgets; errors at given places; the best method; exponents."
    )
    budget: Positive | tuple[Positive, ...] | None = Field(None, description="Inference cost (several: best-method).")
    of: str | None = Field(
        None, description="allocation: the axis asked for; by default the one that trades against size."
    )
    low: Positive | None = Field(None, description="frontier: least budget.")
    high: Positive | None = Field(None, description="frontier: largest budget.")
    points: Count | None = Field(None, description="frontier: number of budgets.")
    at: dict[str, Number | tuple[Number, ...]] | None = Field(
        None, description="prediction: a value per axis, or lists."
    )
    names: tuple[str, ...] | None = Field(None, description="exponents: which parameters.")
    cost: str | None = Field(None, description="Inference cost as an expression of the axes and Q; default 2*N*(Q+V).")
    q: NotNegative | None = Field(None, description="Text tokens Q per answer; default 50.")
    group: str | None = Field(None, description="One law of several (method, task); default all.")
    width: Positive | None = Field(None, description="Half-width of the 95 % interval at which the search may stop.")
    confidence: Positive | None = Field(
        None, le=1, description="best-method: probability at which the search may stop."
    )


class ContenderBlock(Block):
    """A competing law with what its variables stand for."""

    law: str
    x: dict[str, str] = Field(default_factory=dict, description="Variable of the law -> axis, e.g. {D: V}.")


OWN_TEXT = "default"
"""Stands among the texts of a sweep for what a model is calibrated on where nothing is said."""


class CalibrationBlock(Block):
    """Text that methods calibrate on instead of what a model was trained on."""

    data: str = Field(
        description="Text files or rows: file, folder, hub:OWNER/NAME or public:NAME/FILE; or default, a model's own text."
    )
    name: str | None = Field(None, description="What the sweep calls it; default: the last part of data.")
    split: str = Field("", description="Of a hub's data set; of a folder, how names of its files begin.")
    field: str = Field("text", description="Field of a row that holds the text; not for text files.")
    length: Whole | None = Field(
        None, ge=2, le=10_000_000, description="Tokens of an example; default 512, or what the model can read."
    )
    samples: Whole | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Examples: the methods' knob n_calib, for all of them; the text must hold as many.",
    )


class SearchBlock(Block):
    """How trials are proposed."""

    sampler: str = Field("grid", description="How trials are proposed; `isoflop samplers` lists the ways.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the sampler; `isoflop samplers NAME` lists them."
    )
    target: TargetBlock | None = Field(None, description="law: what to find out.")
    axes: dict[str, str | Number | tuple[str, ...]] = Field(
        default_factory=dict,
        description="law: axis -> knob, expression of knobs and N, or the first knob of a list that exists; N is the model's size.",
    )
    laws: tuple[str | ContenderBlock, ...] = Field(("product",), min_length=1, description="law: competing forms.")
    by: tuple[Literal["method", "model"], ...] = Field((), description="law: a law each for these.")
    share: Literal["exponents"] | tuple[str, ...] = Field((), description="law: parameters that these laws share.")
    cost: str | None = Field(
        None,
        description="law: cost of a trial until FLOPs are measured, an expression of the axes and Q; default the target's.",
    )
    pruner: Literal["none", "median", "hyperband", "wilcoxon"] = Field(
        "none", description="Optuna's pruner; stops hopeless jobs between shards."
    )
    pruner_options: dict[str, Any] = Field(default_factory=dict, description="Options of the pruner.")


COMMON_SEARCH_KEYS = ("sampler", "options", "pruner", "pruner_options")
"""Keys of the search block that every sampler knows; the others are for those that name them."""


class Objective(Block):
    """What the search minimises or maximises: a column of the ledger or a metric, averaged over a trial's jobs."""

    metric: str = Field("error", description="error, or any column, metric or footprint key of a row.")
    direction: Literal["minimize", "maximize"] = "minimize"
    task: str | None = Field(None, description="Only this task; by default the mean over all tasks.")


class Budget(Block):
    """When to stop: whichever ends first. Without any limit a grid runs to its end."""

    trials: Count | None = Field(None, description="Trials of the sweep, earlier sessions included.")
    jobs: Count | None = Field(None, description="Jobs with a result, earlier sessions included.")
    hours: Positive | None = Field(None, description="Wall-clock hours of one run or resume.")
    flops: Positive | None = Field(None, description="Measured FLOPs per answer times answers, summed over rows.")


class ResourcesBlock(Block):
    """What one job gets; the cluster is divided into as many slots of this size as fit."""

    cpus: Positive = 1
    gpus: NotNegative = Field(
        0,
        description="A fraction packs several jobs on one GPU; with several, a checkpoint is spread over them; 0 hides all GPUs.",
    )
    memory: Bytes | None = Field(None, description="Host memory per job, e.g. 4GiB.")

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("must be a fraction of one GPU or a whole number of GPUs")
        return value


class Limits(Block):
    """Deadlines and retries."""

    timeout: Seconds = Field(3600.0, description="Per job; seconds, or 10m, 2h.")
    stage_timeout: Seconds = Field(4 * 3600.0, description="Per shared stage (training, features).")
    retries: Whole = Field(
        1, ge=0, le=100, description="How often a failed job is tried again; a mistake in code (TypeError …) is not."
    )


class LawBlock(Block):
    """A scaling law to fit at the end."""

    law: str = "product"
    y: str = Field("error", description="Column or expression to predict.")
    x: dict[str, str] = Field(
        default_factory=dict, description="Variable of the law -> column or expression, e.g. {N: N, V: V}."
    )
    by: tuple[str, ...] = Field(("task",), description="One fit per value of these columns.")
    where: str | None = Field(None, description="SQL condition on rows.")
    objective: Literal["squared", "huber", "squared-log", "huber-log"] = Field(
        "squared", description="Residuals of y, or of ln y (-log)."
    )
    delta: Positive = Field(1e-3, description="Where Huber's terms turn linear.")
    weights: str | None = Field(None, description="Column or expression, e.g. 1/error_se**2.")
    fixed: dict[str, Number] = Field(default_factory=dict, description="Parameters held at a value, e.g. {E: 0}.")
    bootstrap: Whole = Field(1000, ge=0, le=100_000, description="Resamples for intervals.")


class FrontierBlock(Block):
    """A frontier to draw at the end, from a law."""

    law: str = "product"
    cost: str | None = Field(
        None,
        description="Inference cost per answer, an expression of law variables and Q, e.g. 2*N*(Q+V); default: all measured FLOPs.",
    )
    q: NotNegative | None = Field(None, description="Text tokens Q per answer; by default as measured.")
    budgets: tuple[Positive, ...] = Field(
        (), description="Budgets in the unit of the cost; by default spread over the swept range."
    )


class ModelEntry(Block):
    """A model reference with options of its family."""

    ref: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


class KnobEntry(Block):
    """What a sweep says of one knob: one ``value``, a list of ``values``, or a range within the method's own.

    Whether ``[1, 2]`` is two values or one that is a list depends on the knob; see ``KnobSpec.values_of``.
    """

    value: Any = None
    values: tuple[Any, ...] | None = None
    low: Number | None = None
    high: Number | None = None
    log: bool | None = None
    step: Positive | None = None
    when: dict[str, Any] = Field(default_factory=dict, description="Only when these other knobs have these values.")

    @model_validator(mode="after")
    def _one_kind(self) -> KnobEntry:
        empty = [name for name in sorted(self.model_fields_set) if getattr(self, name) is None]
        if empty:
            what = "has no value" if empty == ["value"] else f"{empty[0]} has no value"
            raise ValueError(f"{what}; give one, a list, or {{}} for the method's own range")
        if self.values is not None:
            if not self.values:
                raise ValueError("the list of values is empty")
            if any(not _is_value(v) for v in self.values):
                raise ValueError(
                    f"the list must hold numbers, texts, true and false, or lists of these: {list(self.values)}"
                )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the range is empty: low {self.low:g} is above high {self.high:g}")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"a log range must begin above 0, not at {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("a range can have log or step, not both")
        return self


def _is_value(value: Any) -> bool:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return all(isinstance(v, (bool, int, float, str)) for v in items)


class MethodEntry(Block):
    """A method with what the sweep says of its knobs; a knob that is not named keeps its default."""

    name: str = Field(min_length=1)
    knobs: dict[str, KnobEntry] = Field(default_factory=dict)


class TaskEntry(Block):
    """A task with its options."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


def _named(value: Any, key: str, rest: str) -> Any:
    """``name`` or ``{name: {…}}`` as a block."""
    if isinstance(value, str):
        return {key: value}
    if isinstance(value, Mapping) and len(value) == 1 and not (key in value and isinstance(value[key], str)):
        ((name, body),) = value.items()
        if not isinstance(name, str):
            raise ValueError(f"{name!r} must be a name")
        if body is None:
            return {key: name}
        if isinstance(body, Mapping):
            return {key: name, rest: body}
        raise ValueError(f"{name} must be followed by a block of {rest}, not by {body!r}")
    if isinstance(value, Mapping) and key in value:
        return value
    if isinstance(value, Mapping):
        raise ValueError(
            f"must be one name with its {rest}; {len(value)} keys found ({', '.join(map(str, value))}): indent the {rest} below the name"
        )
    raise ValueError(f"must be a name or a name with its {rest}, not {value!r}")


def _knob(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return {"values": tuple(value)}
    return {"value": value}


def _method(value: Any) -> Any:
    block = _named(value, "name", "knobs")
    knobs = block.get("knobs") or {}
    if not isinstance(knobs, Mapping):
        raise ValueError(f"knobs must be a block, not {knobs!r}")
    return {**block, "knobs": {str(k): _knob(v) for k, v in knobs.items()}}


def _composition(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("a composition of methods is empty")
        return tuple(_method(v) for v in value)
    return (_method(value),)


def _calibrations(value: Any) -> Any:
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [{"data": one} if isinstance(one, str) else one for one in listed]


Calibrations = Annotated[tuple[CalibrationBlock, ...], BeforeValidator(_calibrations)]
Model_ = Annotated[ModelEntry, BeforeValidator(lambda v: _named(v, "ref", "options"))]
Composition = Annotated[tuple[MethodEntry, ...], BeforeValidator(_composition)]
Task_ = Annotated[TaskEntry, BeforeValidator(lambda v: _named(v, "name", "options"))]
