"""What is wrong with one setting, in words that follow its name: "must be a whole number"."""

from __future__ import annotations

import re
from typing import Any, Final

_SAID: Final = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "path_type": "must be a path",
    "model_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}
_SUBJECT: Final = re.compile(r"^\w+ should ")


def problem(error: Any) -> str:
    """Of one of the errors of a `ValidationError`."""
    said = _SAID.get(error["type"])
    if said is not None:
        return said
    message = str(error["msg"]).removeprefix("Value error, ")
    return _SUBJECT.sub("must ", message).replace(" after validation", "")
