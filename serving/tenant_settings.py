"""The settings of tenants: how a request's is told, and what each may spend a day."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DEFAULT_TENANT: Final = "default"
OTHERS: Final = "*"
"""In `budgets`: every tenant that is not named there."""
MAX_NAME: Final = 64
NAME_RULE: Final = f"1 to {MAX_NAME} letters, digits, '_', '.', '-', the first a letter or digit"
_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
_HEADER: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# What they carry is a secret, or means something else already.
_TAKEN: Final = frozenset(
    {
        "authorization", "proxy-authorization", "x-api-key", "cookie", "host", "connection",
        "content-length", "content-type", "content-encoding", "transfer-encoding", "expect",
        "accept-encoding", "inference-header-content-length", "x-request-id",
        "x-request-timeout-ms", "upgrade",
    }
)  # fmt: skip


def is_tenant_name(name: str) -> bool:
    """Whether it is a name that a tenant can have; see `NAME_RULE`."""
    return _NAME.fullmatch(name) is not None


def _fault(why: str) -> PydanticCustomError:
    return PydanticCustomError("tenants", "{why}", {"why": why})


def _named(value: str) -> str:
    if not is_tenant_name(value):
        raise _fault(f"is no name of a tenant; allowed: {NAME_RULE}")
    return value


def _named_or_others(value: str) -> str:
    return value if value == OTHERS else _named(value)


def _header(value: str) -> str:
    name = value.lower()
    if not _HEADER.fullmatch(name):
        raise _fault("is no header's name")
    if name in _TAKEN:
        raise _fault("is a header that has another meaning; name one such as x-tenant")
    return name


def _digest(value: object) -> object:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        # It may be the key itself: not shown, see `TenantsConfig`.
        raise _fault("is no SHA-256 in 64 lower-case hex digits, as sha256sum prints it of a key")
    return value


TenantName = Annotated[str, AfterValidator(_named)]
KeyDigest = Annotated[str, BeforeValidator(_digest)]
Dollars = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class TenantsConfig(BaseModel):
    """Who pays. Without keys, header and budgets every request is the default tenant's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    header: Annotated[str, AfterValidator(_header)] | None = Field(
        None, description="The request header that names the tenant, such as x-tenant."
    )
    default: TenantName = Field(
        DEFAULT_TENANT, description="The tenant of a request that has neither key nor header."
    )
    keys: dict[TenantName, tuple[KeyDigest, ...]] = Field(
        default_factory=dict,
        description="API keys by tenant, each as the SHA-256 of the key in hex. Sent as "
        "`Authorization: Bearer KEY` or `x-api-key: KEY`.",
    )
    require_key: bool = Field(
        False, description="Answer 401 to an inference request without a key."
    )
    max_unlisted: int = Field(
        100,
        ge=0,
        le=10_000,
        description="Most tenants that a gateway takes from the header and that neither `keys` nor "
        "`budgets` name. One more is answered 403.",
    )
    budgets: dict[Annotated[str, AfterValidator(_named_or_others)], Dollars | None] = Field(
        default_factory=dict,
        description="What a tenant may spend a UTC day, in USD of direct cost; null: without "
        "bound. `*`: each tenant that is not named. Past it the answer is 429.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TenantsConfig:
        for fault in self._faults():
            raise _fault(fault)
        return self

    def _faults(self) -> Iterator[str]:
        if self.require_key and not self.keys:
            yield "require_key is set, but there are no keys"
        for tenant, digests in self.keys.items():
            if not digests:
                yield f"keys.{tenant} lists no key"
        listed = [digest for digests in self.keys.values() for digest in digests]
        if len(listed) > len(set(listed)):
            yield "keys lists one key twice: it would not tell whose it is"
        if self.default in self.keys and not self.require_key:
            yield (
                f"the tenant {self.default!r} has keys, but is also that of requests without one; "
                "set require_key, or another default"
            )
        if self.header is None:
            for tenant in self.budgets.keys() - {OTHERS, self.default, *self.keys}:
                yield f"budgets names {tenant!r}, but without a header or keys no request is its"

    @property
    def listed(self) -> frozenset[str]:
        """The tenants that are known by name."""
        return frozenset({self.default, *self.keys, *self.budgets} - {OTHERS})

    def budget(self, tenant: str) -> float | None:
        """What a tenant may spend a UTC day, in USD; None if that has no bound."""
        return self.budgets.get(tenant, self.budgets.get(OTHERS))
