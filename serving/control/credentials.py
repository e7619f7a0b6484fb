"""Secrets that a plan names by environment variable. Their values are never logged or stored."""

from __future__ import annotations

import os

from serving.control.outbound import NoAnswer


def secret(variable: str) -> str:
    """The value of the environment variable; "" where none is named.

    Raises `NoAnswer` where it is unset or empty: nothing goes out unsigned by accident.
    """
    value = os.environ.get(variable, "").strip() if variable else ""
    if variable and not value:
        raise NoAnswer(f"the controller's environment has no {variable}, which secret_env names")
    if not (value.isascii() and value.isprintable()):
        raise NoAnswer(f"{variable}, which secret_env names, must be printable ASCII")
    return value
