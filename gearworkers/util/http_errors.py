"""urllib3's errors told in ours."""

from __future__ import annotations

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, SSLError
from urllib3.util import Retry

from gearworkers.errors import FailedPrecondition, GearError, InvalidInput, Unavailable


def from_http_error(exc: HTTPError | OSError, tried: str, ca_belongs_in: str) -> GearError:
    """Translate *exc* into the tree; use as ``raise from_http_error(exc, …) from exc``.

    Args:
        exc: What urllib3 raised for a request or while its answer was read.
        tried: What was being done, on what: the first half of the message.
        ca_belongs_in: Where a CA is put that is to be trusted.
    """
    reason = exc.reason if isinstance(exc, MaxRetryError) else exc
    if isinstance(reason, SSLError) and "CERTIFICATE" in str(reason).upper():
        return FailedPrecondition(f"{tried}: {reason}; its CA belongs in {ca_belongs_in}")
    if isinstance(reason, LocationParseError):
        return InvalidInput(f"{tried}: {reason}")
    return Unavailable(f"{tried}: {reason}")


def retry_after_s(response: BaseHTTPResponse) -> float:
    """How long the server wants not to be asked again, by its Retry-After; 0 if it says nothing of that."""
    try:
        return Retry().get_retry_after(response) or 0.0
    except HTTPError:
        return 0.0
