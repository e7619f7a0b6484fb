"""The settings of a served model, as pydantic models: what may be written, and the bounds."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serving.config_types import Frozen, Resources, VersionRef
from serving.core.rollout_spec import PLAN_NAMES, RolloutSpec
from serving.errors import ConfigError
from serving.rollout_plans import parse_plan
from serving.scaling_settings import ScalingSettings

IMMEDIATE: Final = "immediate"
"""Instead of a plan: the new version answers as soon as it is ready, unobserved."""


def _rollout(value: object) -> object:
    """A plan is checked where it is written, not when its rollout starts."""
    if isinstance(value, dict):
        try:
            parse_plan(value, source="")
        except ConfigError as error:
            raise PydanticCustomError("plan", "{why}", {"why": str(error)}) from error
    elif value not in (IMMEDIATE, *PLAN_NAMES):
        names = ", ".join((*PLAN_NAMES, IMMEDIATE))
        why = f"{value!r} is no plan; allowed: {names}, a path to a .yaml file, or a mapping"
        raise PydanticCustomError("plan", "{why}", {"why": f": {why}"})
    return value


class BatchingConfig(Frozen):
    """How requests are merged into one run of the model."""

    max_size: int = Field(64, ge=1, le=65536, description="Most rows in one run.")
    max_delay_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="Longest wait for batch-mates. 0: leave as soon as a replica is free.",
    )
    buckets: tuple[int, ...] | None = Field(
        None,
        description="Pad a batch up to one of these row counts. "
        "Default: no padding (powers of two on CUDA).",
    )

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or value[0] < 1 or list(value) != sorted(set(value))):
            raise ValueError("must be a non-empty, strictly ascending list of row counts ≥ 1")
        return value


class QueueConfig(Frozen):
    """What may wait for a replica. A request past these bounds is answered 429 or 503 at once."""

    max_rows: int = Field(8192, ge=1, description="Most rows waiting for one version.")
    max_wait_ms: float = Field(2000.0, gt=0, description="Longest estimated wait at admission.")
    hold_ms: float = Field(
        15_000.0,
        ge=0,
        description="How long requests may wait while all replicas are being replaced.",
    )


class OnnxConfig(Frozen):
    """ONNX Runtime session options."""

    intra_op_threads: int = Field(
        1, ge=0, le=256, description="Threads inside an operator; 0: one per core."
    )
    inter_op_threads: int = Field(1, ge=1, le=256, description="Operators run side by side.")
    graph_optimization: Literal["disabled", "basic", "extended", "all"] = Field(
        "all", description="How far ONNX Runtime rewrites the graph at load."
    )
    providers: tuple[Literal["tensorrt", "cuda", "cpu"], ...] | None = Field(
        None, description="Execution providers in order. Default: by `device`."
    )


class TorchConfig(Frozen):
    """Torch settings."""

    threads: int = Field(
        1, ge=0, le=256, description="Intra-op threads on the CPU; 0: torch's own choice."
    )
    compile: bool = Field(
        False, description="Run `torch.compile` over the loaded module at warm-up."
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="Cast floating-point weights and inputs. Default: as exported."
    )


class ModelConfig(Frozen):
    """One served model."""

    version: VersionRef = Field(
        "@champion", description="What /v2/models/NAME answers with: a number or an @alias."
    )
    also_serve: tuple[VersionRef, ...] = Field(
        (), description="More versions, addressed by /versions/V only."
    )
    replicas: int = Field(1, ge=1, le=1000, description="Replicas per version.")
    scaling: ScalingSettings | None = Field(
        None, description="Replicas by load instead of `replicas`: a mapping."
    )
    resources: Resources = Field(
        default_factory=dict, description="Ray resources each replica needs, to choose its node."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`cuda` refuses to start without a GPU."
    )
    gpu_memory_bytes: int | None = Field(
        None,
        ge=64 << 20,
        description="GPU memory each replica gets and is held to. Default: what the version was "
        "measured to take, with the margin; before its first load, an estimate.",
    )
    timeout_ms: float = Field(30_000.0, gt=0, description="Default deadline of a request.")
    batching: BatchingConfig = BatchingConfig()
    queue: QueueConfig = QueueConfig()
    onnx: OnnxConfig = OnnxConfig()
    torch: TorchConfig = TorchConfig()
    stall_timeout_s: float = Field(
        30.0, gt=0, description="A replica whose run lasts longer is replaced."
    )
    ready_timeout_s: float = Field(
        300.0,
        gt=0,
        description="A version that is not ready by then is given up. A plan's `ready_timeout` is "
        "this, unless it says less.",
    )
    usd_per_hour: float | None = Field(
        None, ge=0, description="Price of one replica. Default: by `cost.prices`."
    )
    rollout: Annotated[str | dict[str, Any], BeforeValidator(_rollout)] = Field(
        PLAN_NAMES[0],
        description="How another version takes over: `canary`, `blue-green`, `shadow-only`, "
        "`fast`, `immediate`, the path of a plan, or a mapping of what differs from one.",
    )

    @property
    def rollout_plan(self) -> RolloutSpec | None:
        """The plan of `rollout`; None for `immediate`."""
        if self.rollout == IMMEDIATE:
            return None
        return parse_plan(self.rollout, source="rollout", ready_timeout_s=self.ready_timeout_s)

    @model_validator(mode="after")
    def _scaling_fits(self) -> ModelConfig:
        if self.scaling is None:
            return self
        if self.replicas != 1:
            why = (
                "replicas and scaling exclude each other; scaling.min and scaling.max say how many"
            )
            raise PydanticCustomError("scaling", "{why}", {"why": why})
        if self.scaling.target_queue_delay * 1e3 <= self.batching.max_delay_ms:
            why = (
                f"scaling.target_queue_delay is {self.scaling.target_queue_delay * 1e3:g} ms, "
                f"batching.max_delay_ms alone is {self.batching.max_delay_ms:g}; allowed: more"
            )
            raise PydanticCustomError("scaling", "{why}", {"why": why})
        return self

    @model_validator(mode="after")
    def _plan_fits(self) -> ModelConfig:
        try:
            _ = self.rollout_plan
        except ConfigError as error:
            raise PydanticCustomError("plan", "{why}", {"why": f".{error}"}) from error
        return self
