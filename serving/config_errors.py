"""What is wrong with a configuration: each fault as one sentence that names the key."""

from __future__ import annotations

from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel], source: str) -> str:
    """Every fault that was found in a `root` read from `source`."""
    return "; ".join(_explain(e, root, source) for e in error.errors())


def _explain(error: Any, root: type[BaseModel], source: str) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]") or "(top level)"
    if error["input"] is None and error["type"] in ("model_type", "dict_type"):
        return f"{source}: {where!r} has nothing after it; write its settings, or {{}} for defaults"
    if error["type"] == "plan":
        return f"{source}: {where}{error['msg']}"
    if error["type"] in ("tenants", "scaling"):
        # Without what was found: it may be a key that was meant to be a hash of one.
        return f"{source}: {where}: {error['msg']}"
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(_allowed_keys(error["loc"][:-1], root))
        return f"{source}: unknown key {where!r}; allowed here: {allowed}"
    if error["type"] == "string_pattern_mismatch" and "[key]" in error["loc"]:
        return (
            f"{source}: {where!r} is not a model name; "
            "allowed: letters, digits, '_', '.', '-', at most 100"
        )
    if error["type"] == "string_pattern_mismatch":
        return (
            f"{source}: {where}: {error['input']!r} is not a version; "
            'allowed: a number like "3" or an @alias'
        )
    return f"{source}: {where}: {error['msg']} (found {error['input']!r})"


def _allowed_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """The keys of what is at `location`: a mapping has settings, or names with settings each."""
    found: Any = root
    for part in location:
        if get_origin(found) is dict:
            found = get_args(found)[1]
        else:
            found = _section(found.model_fields[str(part)].annotation)
    return sorted(found.model_fields)


def _section(annotation: Any) -> Any:
    """A section's model, also where it may be left out."""
    if get_origin(annotation) is not UnionType:
        return annotation
    return next((a for a in get_args(annotation) if hasattr(a, "model_fields")), annotation)
