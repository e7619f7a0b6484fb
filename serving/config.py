"""Configuration: YAML and environment to frozen, typed models; anything wrong fails loudly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serving.config_errors import explain, explain_yaml
from serving.core.prices import DEFAULT_PRICES, PriceBook
from serving.core.rollout_spec import PLAN_NAMES, RolloutSpec
from serving.errors import ConfigError
from serving.prices import PriceRow, load_rows, price_book
from serving.rollout_plans import parse_plan, read_plan
from serving.scaling_settings import ScalingSettings
from serving.tenant_settings import TenantsConfig

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
VERSION_PATTERN = r"^(@[A-Za-z][A-Za-z0-9_-]{0,63}|[1-9][0-9]{0,8})$"

ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME_PATTERN)]


def _version_number(value: object) -> object:
    """A version written without quotes is a number in YAML."""
    return str(value) if type(value) is int else value


VersionRef = Annotated[
    str, BeforeValidator(_version_number), StringConstraints(pattern=VERSION_PATTERN)
]
Port = Annotated[int, Field(ge=0, le=65535)]


# Ray keeps these for itself, or this project gives them.
_RESERVED_RESOURCES: Final = frozenset({"CPU", "GPU", "memory", "object_store_memory", ""})


def _own_resources(value: dict[str, float]) -> dict[str, float]:
    if reserved := sorted(_RESERVED_RESOURCES & value.keys()):
        raise ValueError(f"{reserved[0]!r} cannot be asked for here; name a custom Ray resource")
    return value


Resources = Annotated[dict[str, PositiveFloat], AfterValidator(_own_resources)]


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


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class GatewayConfig(_Frozen):
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


class ControlConfig(_Frozen):
    """The controller: admin API and metrics."""

    host: str = Field(
        "127.0.0.1",
        description="Address of the admin API and /metrics. Loopback unless told otherwise.",
    )
    port: Port = Field(8002, description="Admin API and /metrics.")
    tick_s: float = Field(
        1.0, ge=0.1, le=60, description="Period of reports, flushes and reconciliation."
    )


class RegistryConfig(_Frozen):
    """The MLflow model registry."""

    uri: str | None = Field(
        None, description="MLflow tracking and registry URI. Default: SQLite in `home`."
    )


class StoreConfig(_Frozen):
    """The control store."""

    url: str | None = Field(None, description="SQLAlchemy URL. Default: SQLite in `home`.")


class ClusterConfig(_Frozen):
    """The Ray cluster. With RAY_ADDRESS set that cluster is used and `num_cpus` is ignored."""

    num_cpus: int | None = Field(
        None, ge=1, description="Logical CPUs of the embedded Ray. Default: all cores."
    )


class GpuConfig(_Frozen):
    """GPU memory."""

    safety_margin: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Share of a replica's GPU memory that what it was measured to take leaves "
        "free.",
    )


class BatchingConfig(_Frozen):
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


class QueueConfig(_Frozen):
    """What may wait for a replica. A request past these bounds is answered 429 or 503 at once."""

    max_rows: int = Field(8192, ge=1, description="Most rows waiting for one version.")
    max_wait_ms: float = Field(2000.0, gt=0, description="Longest estimated wait at admission.")
    hold_ms: float = Field(
        15_000.0,
        ge=0,
        description="How long requests may wait while all replicas are being replaced.",
    )


class OnnxConfig(_Frozen):
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


class TorchConfig(_Frozen):
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


class ModelConfig(_Frozen):
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


class CostConfig(_Frozen):
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


class ServingConfig(_Frozen):
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
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not valid YAML: {explain_yaml(error)}") from error
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
