"""Price books as people write them: YAML rows of what each is for, its price, source and date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from serving.core.prices import Match, Price, PriceBook
from serving.errors import ConfigError
from serving.validation_text import problem
from serving.yaml_files import read_yaml


def _date(value: object) -> object:
    """YAML reads 2026-11-23 as a date."""
    return value.isoformat() if hasattr(value, "isoformat") else value


Text = Annotated[str, Field(min_length=1, max_length=200)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MatchRow(_Row):
    """What a price is for."""

    gpu: Text | None = Field(None, description="Pattern of a GPU's name, as in `*H100*`.")
    cpu: Literal["core"] | None = Field(None, description="`core`: a CPU core.")
    instance: Text | None = Field(
        None, description="Only on machines of this type: a pattern of the node's instance label."
    )
    labels: dict[Text, Text] = Field(
        default_factory=dict, description="Only on nodes with these labels; values are patterns."
    )

    @model_validator(mode="after")
    def _one_thing(self) -> MatchRow:
        if (self.gpu is None) == (self.cpu is None):
            raise ValueError("a row prices either `gpu: PATTERN` or `cpu: core`")
        return self


class PriceRow(_Row):
    """One price."""

    match: MatchRow = Field(description="What it is for.")
    usd_per_hour: float = Field(ge=0, le=1e6, description="US dollars an hour of one GPU or core.")
    source: Text = Field(description="Where the price is from.")
    as_of: Annotated[str, BeforeValidator(_date), Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")] = Field(
        description="When it was valid: YYYY-MM or YYYY-MM-DD."
    )

    def to_price(self) -> Price:
        """The row as the ledger uses it."""
        row = self.match
        match = Match(row.gpu, row.cpu is not None, row.instance, row.labels)
        return Price(match, self.usd_per_hour, self.source, self.as_of)


def _read(path: Path) -> list[Any]:
    raw = read_yaml(path)
    if not isinstance(raw, list):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path}: expected a list of prices, found {found}")
    return raw


def load_rows(path: Path) -> list[PriceRow]:
    """The rows of a price book. Raises `ConfigError` naming file, row, key and what is allowed."""
    rows = []
    for number, raw in enumerate(_read(path), 1):
        try:
            rows.append(PriceRow.model_validate(raw))
        except ValidationError as error:
            problems = "; ".join(_explain(e) for e in error.errors())
            raise ConfigError(f"{path}: row {number}: {problems}") from error
    return rows


def price_book(rows: Sequence[PriceRow]) -> PriceBook:
    """A price book of these rows."""
    return PriceBook([row.to_price() for row in rows])


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        model = MatchRow if len(error["loc"]) > 1 else PriceRow
        return f"unknown key {where!r}; allowed here: {', '.join(model.model_fields)}"
    message = problem(error)
    if error["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (found {error['input']!r})" if where else message
