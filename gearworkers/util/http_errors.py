"""Translation of urllib3's errors."""

from __future__ import annotations

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, SSLError
from urllib3.util import Retry

from gearworkers.errors import FailedPrecondition, GearError, InvalidInput, Unavailable


def from_http_error(exc: HTTPError | OSError, tried: str, ca_location: str) -> GearError:
    """Return our error for *exc*; use as ``raise from_http_error(exc, …) from exc``.

    Args:
        exc: An error of urllib3, from a request or from reading its response.
        tried: The attempted action and its object, the first half of the message.
        ca_location: The setting or file where trusted CAs belong.
    """
    reason = exc.reason if isinstance(exc, MaxRetryError) else exc
    if isinstance(reason, SSLError) and "CERTIFICATE" in str(reason).upper():
        return FailedPrecondition(f"{tried}: {reason}; put its CA into {ca_location}")
    if isinstance(reason, LocationParseError):
        return InvalidInput(f"{tried}: {reason}")
    return Unavailable(f"{tried}: {reason}")


def retry_after_s(response: BaseHTTPResponse) -> float:
    """Return the seconds of the response's Retry-After header; 0 without one."""
    try:
        return Retry().get_retry_after(response) or 0.0
    except HTTPError:
        return 0.0
