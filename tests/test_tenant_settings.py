"""The tenants section of a configuration, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from serving.config import parse_config
from serving.control.layout import check_fixed_settings
from serving.errors import ConfigError, ConflictError
from serving.tenant_settings import TenantsConfig

HASH = hashlib.sha256(b"a key").hexdigest()


def tenants(**settings: Any) -> TenantsConfig:
    return parse_config({"tenants": settings}, source="f.yaml").tenants


def test_it_survives_the_way_to_another_process() -> None:
    config = tenants(header="X-Tenant", keys={"a": [HASH]}, budgets={"a": 5, "*": 1, "b": None})
    assert config.header == "x-tenant"
    assert tenants(**json.loads(config.model_dump_json())) == config


def test_budgets_by_name_and_of_all_others() -> None:
    config = tenants(header="x-tenant", budgets={"a": 5, "*": 1, "b": None})
    assert [config.budget(name) for name in ("a", "b", "c", "default")] == [5.0, None, 1.0, 1.0]
    assert tenants().budget("a") is None
    assert config.listed == {"a", "b", "default"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"header": "x tenant"}, "f.yaml: tenants.header: is no header's name"),
        ({"header": "Authorization"}, "f.yaml: tenants.header: is a header that has another"),
        ({"default": "a/b"}, "f.yaml: tenants.default: is no name of a tenant; allowed: 1 to 64"),
        ({"keys": {"": [HASH]}}, "is no name of a tenant"),
        ({"keys": {"*": [HASH]}}, "is no name of a tenant"),
        ({"keys": {"a": []}}, "f.yaml: tenants: keys.a lists no key"),
        ({"keys": {"a": [HASH], "b": [HASH]}}, "lists one key twice"),
        ({"keys": {"default": [HASH]}}, "set require_key, or another default"),
        ({"keys": {"a": [HASH.upper()]}}, "f.yaml: tenants.keys.a.0: is no SHA-256 in 64"),
        ({"require_key": True}, "require_key is set, but there are no keys"),
        ({"budgets": {"a": 1}}, "budgets names 'a', but without a header or keys"),
        ({"budgets": {"default": 0}}, "greater than 0"),
        ({"budgets": {"default": float("inf")}}, "finite"),
        ({"header": "x-tenant", "max_unlisted": 10**6}, "less than or equal to 10000"),
        ({"haeder": "x"}, "unknown key 'tenants.haeder'; allowed here: budgets, default, header"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        tenants(**settings)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("key", ["my secret key", 12345])
def test_a_key_in_place_of_its_hash_is_not_shown(key: Any) -> None:
    with pytest.raises(ConfigError) as found:
        tenants(keys={"a": [key]})
    assert "tenants.keys.a.0: is no SHA-256" in str(found.value)
    assert str(key) not in str(found.value)


def test_hashes_are_not_in_a_conflicts_message() -> None:
    running, new = (
        parse_config({"tenants": {"keys": {"a": [h]}}}, source="") for h in (HASH, HASH[::-1])
    )
    with pytest.raises(ConflictError, match="tenants is another where it runs") as found:
        check_fixed_settings(new, running)
    assert HASH not in str(found.value)
