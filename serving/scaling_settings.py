"""The settings of a model's scaling, as a pydantic model: what may be written, and the bounds."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.core.scaling import Scaling
from serving.rollout_settings import Span

_DEFAULT: Final = Scaling()


class ScalingSettings(BaseModel):
    """`models.NAME.scaling`: how many replicas there are, by load."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    min: int = Field(
        1, ge=0, le=1000, description="Fewest replicas. 0: none while no request comes."
    )
    max: int = Field(ge=1, le=1000, description="Most replicas.")
    target_queue_delay: Span = Field(
        _DEFAULT.target_queue_delay_s,
        description="How long 95 % of requests may wait before they run: a part of the latency "
        'objective. Seconds, or "10ms".',
    )
    target_utilization: float = Field(
        _DEFAULT.target_utilization,
        gt=0,
        le=1,
        description="The share of the time that a replica is to be busy.",
    )
    scale_down_after: Span = Field(
        _DEFAULT.scale_down_after_s,
        description='Replicas go when all of this time fewer would have done. Seconds, or "60s".',
    )
    idle_to_zero_after: Span = Field(
        _DEFAULT.idle_to_zero_after_s,
        description="With `min: 0`: the last replica goes after so long without a request. "
        'Seconds, or "10m".',
    )
    wake_queue: int = Field(
        _DEFAULT.wake_queue,
        ge=1,
        le=100_000,
        description="With `min: 0`: most requests that wait at one gateway for the first replica.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ScalingSettings:
        if self.min > self.max:
            raise PydanticCustomError(
                "scaling",
                "min: {min} is more than max: {max}",
                {"min": self.min, "max": self.max},
            )
        zero = {
            "idle_to_zero_after": self.idle_to_zero_after != _DEFAULT.idle_to_zero_after_s,
            "wake_queue": self.wake_queue != _DEFAULT.wake_queue,
        }
        if self.min and any(zero.values()):
            named = next(key for key, given in zero.items() if given)
            raise PydanticCustomError(
                "scaling",
                "{named} is for min: 0 only, and min is {min}",
                {"named": named, "min": self.min},
            )
        return self

    @property
    def spec(self) -> Scaling:
        """The settings as decisions take them."""
        return Scaling(
            least=self.min,
            most=self.max,
            target_queue_delay_s=self.target_queue_delay,
            target_utilization=self.target_utilization,
            scale_down_after_s=self.scale_down_after,
            idle_to_zero_after_s=self.idle_to_zero_after,
            wake_queue=self.wake_queue,
        )
