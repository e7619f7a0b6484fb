"""Every error a user can meet, as one tree.

A class is a slug (stable, for metrics and clients), an HTTP status and a gRPC code. Each transport
maps an error once, from these class attributes; anything else that escapes becomes an opaque 500
with a request id.
"""

from __future__ import annotations

import math


class ServingError(Exception):
    """Base of all errors raised on purpose. `str(error)` is a sentence for the user."""

    slug = "internal"
    http_status = 500
    grpc_code = "INTERNAL"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def retry_after(self) -> int | None:
        """What the header Retry-After says: whole seconds, at least one."""
        return None if self.retry_after_s is None else max(1, math.ceil(self.retry_after_s))


# What a client's request can meet.


class InvalidRequest(ServingError):
    """The request is malformed, or does not fit the model's signature."""

    slug = "invalid_request"
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class Unauthenticated(ServingError):
    """The request has no API key where one is needed, or one that is not known."""

    slug = "unauthenticated"
    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class Forbidden(ServingError):
    """The request names a tenant that it may not act for."""

    slug = "forbidden"
    http_status = 403
    grpc_code = "PERMISSION_DENIED"


class NotFound(ServingError):
    """No such model, version or route."""

    slug = "not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"


class MethodNotAllowed(ServingError):
    """The path exists, the method does not."""

    slug = "method_not_allowed"
    http_status = 405
    grpc_code = "UNIMPLEMENTED"


class RequestTimeout(ServingError):
    """The client took too long to send its request."""

    slug = "request_timeout"
    http_status = 408
    grpc_code = "CANCELLED"


class PayloadTooLarge(ServingError):
    """The body exceeds the gateway's limit."""

    slug = "payload_too_large"
    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"


class UnsupportedEncoding(ServingError):
    """A content encoding other than gzip, deflate or identity."""

    slug = "unsupported_encoding"
    http_status = 415
    grpc_code = "UNIMPLEMENTED"


class HeadersTooLarge(ServingError):
    """The request head exceeds the gateway's limit."""

    slug = "headers_too_large"
    http_status = 431
    grpc_code = "RESOURCE_EXHAUSTED"


class Unsupported(ServingError):
    """A protocol feature that this server does not have."""

    slug = "unsupported"
    http_status = 501
    grpc_code = "UNIMPLEMENTED"


class Overloaded(ServingError):
    """The queue is as long as the deadline, or a bound, allows. Carries `retry_after_s`."""

    slug = "overloaded"
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class BudgetSpent(ServingError):
    """The tenant has spent its budget of the day. Carries `retry_after_s`, until it renews."""

    slug = "budget_spent"
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class Unavailable(ServingError):
    """No replica can answer now. Carries `retry_after_s`."""

    slug = "unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(ServingError):
    """The request's deadline passed before it was answered."""

    slug = "deadline_exceeded"
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class ModelFailed(ServingError):
    """The model raised, or returned something that does not fit its signature."""

    slug = "model_failed"
    http_status = 500
    grpc_code = "INTERNAL"


class OutOfMemory(ServingError):
    """Not even the smallest run fits into the device's memory. Larger ones are run in parts."""

    slug = "out_of_memory"
    http_status = 500
    grpc_code = "RESOURCE_EXHAUSTED"


# What an operator can meet.


class OperatorError(ServingError):
    """Base of errors that the command line prints as one line and exits with `exit_code`."""

    slug = "operator"
    http_status = 400
    grpc_code = "FAILED_PRECONDITION"
    exit_code = 1


class ConfigError(OperatorError):
    """A file, flag or environment variable is wrong: names it, the key and what is allowed."""

    slug = "config"
    exit_code = 2


class ArtifactError(OperatorError):
    """A model file is missing, unreadable, tampered with, or of a kind that is not served."""

    slug = "artifact"


class RegistryError(OperatorError):
    """The model registry cannot be read, or lacks what was asked for."""

    slug = "registry"
    http_status = 502


class StoreError(OperatorError):
    """The control store is locked, full, unreadable or of a newer schema."""

    slug = "store"
    http_status = 503


class DeviceError(OperatorError):
    """The device that was asked for is not there. Never answered by a silent fallback."""

    slug = "device"


class ClusterError(OperatorError):
    """Ray, Serve or one of our processes cannot be started or reached."""

    slug = "cluster"
    http_status = 503


class ConflictError(OperatorError):
    """What was asked for contradicts what runs, or what someone else just changed."""

    slug = "conflict"
    http_status = 409


def operator_error(slug: str, sentence: str) -> OperatorError:
    """The error that `slug` names, as another process reported it; else a `ClusterError`."""
    kinds = {kind.slug: kind for kind in OperatorError.__subclasses__()}
    return kinds.get(slug, ClusterError)(sentence)


def first_line(error: BaseException) -> str:
    """An error's message, cut to its first line; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
