"""Whose a request is, by its API key or header, and whether that tenant may still spend today.

Keys are known by their hashes only, and a key that a client sends is neither kept nor told.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from serving.errors import BudgetSpent, Forbidden, InvalidRequest, Unauthenticated
from serving.tenant_settings import NAME_RULE, TenantsConfig, is_tenant_name

_AUTHORIZATION: Final = b"authorization"
_API_KEY: Final = b"x-api-key"
_SCHEME: Final = b"bearer "

Headers = Sequence[tuple[bytes, bytes]]


class Tenants:
    """The tenants of one gateway. Lives on its loop."""

    def __init__(self, config: TenantsConfig, unix: Callable[[], float] = time.time) -> None:
        self._default = config.default
        self._header = None if config.header is None else config.header.encode()
        # Looked up by hash: how long that takes says nothing of any key.
        self._keys = {
            bytes.fromhex(digest): tenant
            for tenant, digests in config.keys.items()
            for digest in digests
        }
        self._keyed = frozenset(config.keys)
        self._require_key = config.require_key
        self._known = set(config.listed)
        self._room = config.max_unlisted
        self._max_unlisted = config.max_unlisted
        self._unix = unix
        self._spent: dict[str, Mapping[str, Any]] = {}

    def identify(self, headers: Headers) -> str:
        """The tenant of a request with these headers, names in lower case.

        Raises `Unauthenticated`, `Forbidden` or `InvalidRequest`.
        """
        owner = self._owner(headers) if self._keys else None
        named = self._named(headers) if self._header is not None else None
        if owner is not None:
            if named is not None and named != owner:
                raise Forbidden(
                    f"{self._header_name} names {named!r}, but the key is of tenant {owner!r}"
                )
            return owner
        if named is None:
            return self._default
        if named in self._keyed:
            raise Unauthenticated(f"tenant {named!r} has keys, and this request brings none")
        if named not in self._known:
            self._admit(named)
        return named

    def _owner(self, headers: Headers) -> str | None:
        """The tenant whose key the request brings; None without one."""
        given = {value.strip() for name, value in headers if name == _API_KEY}
        given |= {
            value[len(_SCHEME) :].strip()
            for name, value in headers
            if name == _AUTHORIZATION and value[: len(_SCHEME)].lower() == _SCHEME
        }
        if len(given) > 1:
            raise Unauthenticated("the request brings several API keys; send one")
        for key in given:
            owner = self._keys.get(hashlib.sha256(key).digest())
            if owner is None:
                raise Unauthenticated("the API key is not known")
            return owner
        if self._require_key:
            raise Unauthenticated(
                "an API key is needed: send Authorization: Bearer KEY, or x-api-key: KEY"
            )
        return None

    def _named(self, headers: Headers) -> str | None:
        """The tenant that the header names; None without it."""
        values = {value.strip() for name, value in headers if name == self._header}
        if not values:
            return None
        name = values.pop().decode("latin-1")
        if values:
            raise InvalidRequest(f"{self._header_name} is there with several values; send one")
        if not is_tenant_name(name):
            raise InvalidRequest(f"{self._header_name} must have {NAME_RULE}")
        return name

    def _admit(self, tenant: str) -> None:
        """Take in a tenant that the configuration does not name: there is memory for each."""
        if not self._room:
            raise Forbidden(
                f"tenant {tenant!r} is not known, and this gateway has taken in all "
                f"{self._max_unlisted} that it may beside those of the configuration"
            )
        self._room -= 1
        self._known.add(tenant)

    @property
    def _header_name(self) -> str:
        return f"header {(self._header or b'').decode()}"

    # Budgets.

    def spent(self, tenants: Mapping[str, Mapping[str, Any]]) -> None:
        """Who has spent his budget, as the controller tells: {"budget", "spent", "until"} each.

        Dollars, and Unix time. It replaces what was told before.
        """
        self._spent = dict(tenants)

    def check_budget(self, tenant: str) -> None:
        """Raise `BudgetSpent` if the tenant has spent its budget of the day."""
        if tenant not in self._spent:
            return
        found = self._spent[tenant]
        left_s = float(found["until"]) - self._unix()
        if left_s > 0:
            renews = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found["until"]))
            raise BudgetSpent(
                f"tenant {tenant!r} has spent its budget of the day: ${found['spent']:.6g} of "
                f"${found['budget']:.6g}; it renews at {renews}",
                retry_after_s=math.ceil(left_s),
            )


def tenants_of(config: TenantsConfig) -> Tenants | None:
    """None where all requests are one tenant's, without a budget: there is nothing to look at."""
    return Tenants(config) if config.header or config.keys or config.budgets else None
