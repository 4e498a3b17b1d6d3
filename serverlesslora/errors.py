"""Errors people can cause or meet; each knows how it looks as an OpenAI error object.

A broken invariant of ours is an `assert`; everything here is somebody's input or a fault we can name.
"""

from __future__ import annotations

from serverlesslora_ipc.messages import WireError


class ServerlessLoraError(Exception):
    """Base of the tree. `status` is the HTTP status; type, code and param are OpenAI's fields."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s

    def to_wire(self) -> WireError:
        return WireError(
            status=self.status, message=self.message, type=type(self).type, code=self.code, param=self.param
        )


class InvalidRequest(ServerlessLoraError):
    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ServerlessLoraError):
    """A key is needed, and what was sent is none that is good here."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class Forbidden(ServerlessLoraError):
    """The key is good, but not for this."""

    status, type, code = 403, "invalid_request_error", "insufficient_permissions"


class ModelNotFound(ServerlessLoraError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class NotFound(ServerlessLoraError):
    status, type, code = 404, "invalid_request_error", "not_found"


class AdapterInvalid(InvalidRequest):
    """The adapter cannot be served; the message says which tensor, field or value and what to do."""

    code = "adapter_invalid"


class AdapterChanged(AdapterInvalid):
    """The adapter is not in the store any more, and its source does not hold it either."""

    code = "adapter_changed"


class Conflict(ServerlessLoraError):
    """What was asked for was decided on a state that is not the present one any more."""

    status, type, code = 409, "invalid_request_error", "conflict"


class RateLimited(ServerlessLoraError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class BudgetSpent(ServerlessLoraError):
    """The tenant has spent what it may spend in this period."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"


class Overloaded(ServerlessLoraError):
    status, type, code = 503, "server_error", "server_overloaded"


class WorkerLost(ServerlessLoraError):
    """The worker process of this domain ended while the request was running."""

    status, code = 500, "worker_lost"


class Unavailable(ServerlessLoraError):
    """A part of the server is starting or restarting; trying again soon will work."""

    status, code = 503, "unavailable"


class StorageFull(ServerlessLoraError):
    """What was asked for cannot be kept: there is no room for it on the disk."""

    status, code = 507, "storage_full"


class ConfigError(ServerlessLoraError):
    """The server cannot start as it was told to."""

    status, code = 400, "config_invalid"
