"""What is wrong with a configuration: each fault as one sentence that names the key."""

from __future__ import annotations

from types import UnionType
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError

from serving.validation_text import problem


def explain(error: ValidationError, root: type[BaseModel], source: str) -> str:
    """Every fault that was found in a `root` read from `source`."""
    faults = [{**e, "loc": _written(e["loc"])} for e in error.errors() if not _is_other_form(e)]
    return "; ".join(_explain(e, root, source) for e in faults)


# Rows or a path: the parser says of each form why it is not that, and names the form.
_PRICES: Final = ("cost", "prices")


def _is_other_form(error: Any) -> bool:
    return bool(error["loc"] == (*_PRICES, "str"))


def _written(location: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without the name of a form, which nobody has written."""
    return (*_PRICES, *location[3:]) if location[:2] == _PRICES else location


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
    if error["type"] == "string_pattern_mismatch" and error["loc"][:2] != _PRICES:
        return (
            f"{source}: {where}: {error['input']!r} is not a version; "
            'allowed: a number like "3" or an @alias'
        )
    if error["type"] == "missing":
        return f"{source}: {where}: {problem(error)}"
    return f"{source}: {where}: {problem(error)} (found {error['input']!r})"


def _allowed_keys(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """The keys of what is at `location`: a mapping has settings, or names with settings each."""
    found: Any = root
    for part in location:
        if get_origin(found) is dict:
            found = get_args(found)[1]
        elif get_origin(found) is tuple:
            found = get_args(found)[0]
        else:
            found = _section(found.model_fields[str(part)].annotation)
    return sorted(found.model_fields)


def _section(annotation: Any) -> Any:
    """A section's model, also where it may be left out."""
    if get_origin(annotation) is not UnionType:
        return annotation
    forms = get_args(annotation)
    return next(
        (a for a in forms if hasattr(a, "model_fields") or get_origin(a) is tuple), forms[0]
    )
