"""Configuration: YAML and environment to frozen, typed models; anything wrong fails loudly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from serving.config_errors import explain
from serving.config_types import Frozen, ModelName, Port, Resources
from serving.core.prices import DEFAULT_PRICES, PriceBook
from serving.errors import ConfigError
from serving.model_settings import ModelConfig
from serving.prices import PriceRow, load_rows, price_book
from serving.rollout_plans import parse_plan, read_plan
from serving.tenant_settings import TenantsConfig
from serving.yaml_files import read_yaml


class GatewayConfig(Frozen):
    """The HTTP data plane."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on. Loopback unless told otherwise."
    )
    port: Port = Field(8000, description="Open Inference Protocol v2 over HTTP.")
    replicas: int = Field(
        1, ge=1, le=64, description="Gateway processes; they share the port (SO_REUSEPORT)."
    )
    server_name: str = Field("serving-gateway", description="The name that GET /v2 reports.")
    max_body_bytes: int = Field(
        64 << 20, ge=1024, description="Largest request body, after decompression."
    )
    max_json_bytes: int = Field(
        16 << 20,
        ge=1024,
        description="Largest JSON in a request; larger tensors are sent as binary data.",
    )
    max_held_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="Most bytes of large request bodies that one gateway holds at a time.",
    )
    max_connections: int = Field(
        10_000, ge=1, description="Most client connections to one gateway at a time."
    )
    max_header_bytes: int = Field(64 << 10, ge=1024, description="Largest request head.")
    max_json_depth: int = Field(32, ge=4, le=512, description="Deepest nesting of a JSON body.")
    max_elements: int = Field(1 << 26, ge=1, description="Most elements in one tensor.")
    keep_alive_s: float = Field(75.0, gt=0, description="An idle connection is closed after this.")
    read_timeout_s: float = Field(
        30.0, gt=0, description="A request must have arrived whole within this."
    )
    write_timeout_s: float = Field(
        30.0, gt=0, description="A client must accept its reply within this."
    )
    resources: Resources = Field(
        default_factory=dict, description="Ray resources each gateway needs, to choose its node."
    )
    drain_s: float = Field(
        15.0, gt=0, description="At shutdown, the longest wait for requests in flight."
    )


class ControlConfig(Frozen):
    """The controller: admin API and metrics."""

    host: str = Field(
        "127.0.0.1",
        description="Address of the admin API and /metrics. Loopback unless told otherwise.",
    )
    port: Port = Field(8002, description="Admin API and /metrics.")
    tick_s: float = Field(
        1.0, ge=0.1, le=60, description="Period of reports, flushes and reconciliation."
    )


class RegistryConfig(Frozen):
    """The MLflow model registry."""

    uri: str | None = Field(
        None, description="MLflow tracking and registry URI. Default: SQLite in `home`."
    )


class StoreConfig(Frozen):
    """The control store."""

    url: str | None = Field(None, description="SQLAlchemy URL. Default: SQLite in `home`.")


class ClusterConfig(Frozen):
    """The Ray cluster. With RAY_ADDRESS set that cluster is used and `num_cpus` is ignored."""

    num_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of the embedded Ray. Default: all cores."
    )


class GpuConfig(Frozen):
    """GPU memory."""

    safety_margin: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of a replica's GPU memory that what it was measured to take leaves "
        "free.",
    )


class CostConfig(Frozen):
    """What things cost, and how long the ledger remembers it."""

    prices: str | tuple[PriceRow, ...] | None = Field(
        None,
        description="Price book: the path of a YAML file, relative to this one, or its rows. "
        "Default: configs/prices.yaml.",
    )
    grid_gco2e_per_kwh: float | None = Field(
        None, ge=0, le=5000, description="Grams of CO₂e a kWh, to estimate emissions of GPUs by."
    )
    retention_days: int = Field(
        90, ge=1, le=3650, description="Minutes older than this are kept as one sum an account."
    )

    @field_validator("prices")
    @classmethod
    def _found(cls, value: object) -> object:
        # `load_config` has put the file's rows in its place.
        if isinstance(value, str):
            raise ValueError("a path is allowed in a configuration file only; give the rows")
        return value

    @property
    def price_book(self) -> PriceBook:
        """The prices that hold."""
        if self.prices is None or isinstance(self.prices, str):
            return PriceBook(DEFAULT_PRICES)
        return price_book(self.prices)


class ServingConfig(Frozen):
    """The whole configuration file."""

    home: Path = Field(
        Path("~/.serving"), description="State: registry, store, artifact cache, certificates."
    )
    gateway: GatewayConfig = GatewayConfig()
    control: ControlConfig = ControlConfig()
    registry: RegistryConfig = RegistryConfig()
    store: StoreConfig = StoreConfig()
    cluster: ClusterConfig = ClusterConfig()
    cost: CostConfig = CostConfig()
    gpu: GpuConfig = GpuConfig()
    tenants: TenantsConfig = TenantsConfig()
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)

    @property
    def home_dir(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().absolute()

    @property
    def registry_uri(self) -> str:
        """The registry's URI with its default filled in."""
        return self.registry.uri or f"sqlite:///{self.home_dir / 'registry.db'}"

    @property
    def store_url(self) -> str:
        """The store's URL with its default filled in."""
        return self.store.url or f"sqlite:///{self.home_dir / 'store.db'}"


def reachable_url(host: str, port: int) -> str:
    """Where a client on this machine finds a listener: a wildcard address becomes loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def load_config(path: Path | None) -> ServingConfig:
    """Read a YAML file (or the defaults) and apply `SERVING_HOME`.

    Raises `ConfigError` naming the file, the key and what is allowed.
    """
    raw: Any = {}
    if path is not None:
        raw = read_yaml(path)
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{path}: expected a mapping at the top level, found {type(raw).__name__}"
            )
        raw = _with_prices(_with_plans(raw, path.parent), path.parent)
    if home := os.environ.get("SERVING_HOME"):
        raw = {**raw, "home": home}
    return parse_config(raw, source=str(path) if path else "defaults")


def _with_prices(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The file with the rows of the price book that it names put in its place."""
    cost = raw.get("cost")
    named = cost.get("prices") if isinstance(cost, dict) else None
    if not isinstance(cost, dict) or not isinstance(named, str):
        return raw
    rows = load_rows(directory / Path(named).expanduser())
    return {**raw, "cost": {**cost, "prices": [row.model_dump(mode="json") for row in rows]}}


def _with_plans(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The file with each plan that it names by path put in its place, relative to the file.

    The configuration goes to other processes and nodes, which do not have the file.
    """
    models = raw.get("models")
    if not isinstance(models, dict):
        return raw
    return {**raw, "models": {name: _with_plan(m, directory) for name, m in models.items()}}


def _with_plan(model: Any, directory: Path) -> Any:
    named = model.get("rollout") if isinstance(model, dict) else None
    if not isinstance(named, str) or Path(named).suffix not in (".yaml", ".yml"):
        return model
    path = directory / Path(named).expanduser()
    plan = read_plan(path)
    parse_plan(plan, source=str(path))
    return {**model, "rollout": plan}


def parse_config(raw: dict[str, Any], *, source: str) -> ServingConfig:
    """Validate a mapping. Raises `ConfigError`; `source` names where the mapping came from."""
    try:
        return ServingConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, ServingConfig, source)) from error
