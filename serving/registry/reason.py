"""Why a library failed, as one line: its errors are wrapped several times on their way here."""

from __future__ import annotations

from typing import Final

_LIMIT: Final = 300


def sentence(error: BaseException) -> str:
    """The innermost reason that says something, on one line of at most 300 characters."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    for reason in reversed(chain):
        if isinstance(reason, OSError) and reason.strerror:
            return reason.strerror + (f": {reason.filename}" if reason.filename else "")
        # SQLAlchemy's errors hold the driver's, which says the same without the statement.
        if (driver := getattr(reason, "orig", None)) is not None:
            return _one_line(driver)
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LIMIT else text[: _LIMIT - 1] + "…"
