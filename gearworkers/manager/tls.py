"""The certificate that the manager shows; it may be renewed at any time."""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from gearworkers.errors import FailedPrecondition
from gearworkers.settings import ManagerSettings
from gearworkers.util.fs import stamp

_log = structlog.get_logger(__name__)


class Certificate:
    """A certificate and its key, read again when a file has changed; what cannot be read is no reason to stop."""

    def __init__(self, cert: Path, key: Path | None) -> None:
        """
        Raises:
            FailedPrecondition: They cannot be used.
        """
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._cert = cert
        self._key = key
        try:
            self._seen = self._stamps()
            self.context.load_cert_chain(cert, key)
        except OSError as exc:
            raise FailedPrecondition(f"GEAR_MANAGER_TLS_CERT_FILE={cert}: {exc}") from exc

    def refresh(self) -> None:
        """Have connections from now on see what the files hold now."""
        try:
            seen = self._stamps()
            if seen != self._seen:
                # Half of a pair that is being replaced fails here, and the next connection tries again.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
                self.context.load_cert_chain(self._cert, self._key)
                self._seen = seen
                _log.info("the certificate was renewed", file=str(self._cert))
        except OSError as exc:
            _log.error("the certificate cannot be renewed", file=str(self._cert), error=str(exc))

    def _stamps(self) -> list[tuple[int, int, int]]:
        return [stamp(path) for path in (self._cert, self._key) if path is not None]


def certificate(settings: ManagerSettings) -> Certificate | None:
    """The one of the settings; None for plain HTTP.

    Raises:
        FailedPrecondition: As `Certificate`.
    """
    cert = settings.tls_cert_file
    return None if cert is None else Certificate(cert, settings.tls_key_file)
