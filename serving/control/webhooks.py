"""Webhooks: what is sent, how it is signed, and what an answer means.

Two ways to use one body: a question (pre-rollout, pre-step, gate, trigger) has a verdict for an
answer, a notice (post-rollout, event) is delivered or not. docs/rollouts-webhooks.md is for those
who write the other end.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from serving.control.credentials import secret
from serving.control.notices import Notice
from serving.control.outbound import Answer, NoAnswer, fetch
from serving.core.rollout_types import ProviderState, Rollout
from serving.core.urls import place

_VERDICTS: Final = ("ok", "fail", "unknown")
_LONGEST_MESSAGE: Final = 200
_RETRIED: Final = frozenset({408, 425, 429})
"""Of the 4xx, those that may go away by themselves."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where messages go. `secret_env` names the variable with the key that signs them, or ""."""

    url: str
    timeout_s: float
    secret_env: str = ""


class Undeliverable(Exception):
    """The receiver refuses the message for good. `str(error)` is a sentence without secrets."""


def ask(
    receiver: Receiver, rollout: Rollout, *, event: str, subject: str, revision: int, at: float
) -> ProviderState:
    """The receiver's verdict. Blocks for its `timeout_s` at most; never raises."""
    key = f"{rollout.id}/{subject}/{at!r}"
    body = _body(rollout, event=event, subject=subject, revision=revision, at=at, key=key)
    try:
        return _verdict(_post(receiver, body), place(receiver.url))
    except NoAnswer as error:
        return ProviderState("unknown", message=str(error))


def tell(receiver: Receiver, notice: Notice) -> None:
    """Deliver a notice. Blocks for the receiver's `timeout_s` at most.

    Raises `NoAnswer` where another try may help and `Undeliverable` where none will.
    """
    body = _body(
        notice.rollout,
        event=notice.event,
        subject=notice.subject,
        revision=notice.revision,
        at=notice.at,
        key=notice.key,
        message=notice.message,
        alert=notice.alert,
    )
    status = (answer := _post(receiver, body)).status
    if answer.ok:
        return
    sentence = f"{place(receiver.url)} answered {status}"
    if status >= 500 or status in _RETRIED:
        raise NoAnswer(sentence)
    raise Undeliverable(sentence)


def signature(key: str, body: bytes) -> str:
    """The value of X-Serving-Signature: HMAC-SHA256 over the body's bytes, in hexadecimal."""
    return "sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


def _body(
    rollout: Rollout,
    *,
    event: str,
    subject: str,
    revision: int,
    at: float,
    key: str,
    message: str = "",
    alert: bool = False,
) -> dict[str, Any]:
    return {
        "event": event,
        "subject": subject,
        # A hash, as it is a header's value too and keys hold names that people chose.
        "id": hashlib.sha256(key.encode()).hexdigest()[:32],
        "at": at,
        "message": message,
        "alert": alert,
        "rollout": rollout.id,
        "model": rollout.model,
        "stable": rollout.stable,
        "canary": rollout.canary,
        "state": rollout.state.value,
        "step": rollout.step,
        "steps": len(rollout.spec.steps),
        "weight": rollout.weight,
        "reason": rollout.reason,
        "actor": rollout.actor,
        "verdicts": [verdict.to_dict() for verdict in rollout.verdicts],
        "revision": revision,
    }


def _post(receiver: Receiver, body: Mapping[str, Any]) -> Answer:
    encoded = orjson.dumps(body)
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": body["id"],
        "X-Serving-Event": body["event"],
    }
    if key := secret(receiver.secret_env):
        headers["X-Serving-Signature"] = signature(key, encoded)
    return fetch("POST", receiver.url, body=encoded, headers=headers, timeout_s=receiver.timeout_s)


def _verdict(answer: Answer, where: str) -> ProviderState:
    if not answer.ok:
        return ProviderState("unknown", message=f"{where} answered {answer.status}")
    if not answer.body.strip():
        return ProviderState("ok", message=f"{where} answered {answer.status}")
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        document = None
    verdict = document.get("verdict") if isinstance(document, dict) else None
    if verdict not in _VERDICTS:
        return ProviderState(
            "unknown", message=f"{where} gave no verdict; allowed: {', '.join(_VERDICTS)}"
        )
    said = " ".join(str(document.get("message") or "").split())[:_LONGEST_MESSAGE]
    return ProviderState(verdict, message=f"{where} says {verdict}" + (f": {said}" if said else ""))
