"""A server's certificate, which may be renewed at any time."""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from gearworkers.errors import FailedPrecondition
from gearworkers.util.fs import file_version

_log = structlog.get_logger(__name__)


class Certificate:
    """A certificate and its key, reloaded when a file has changed; if that fails, the old ones stay in use."""

    def __init__(self, cert: Path, key: Path | None, setting: str) -> None:
        """
        Args:
            cert: PEM file of the certificate and its chain.
            key: PEM file of the key; None: *cert* contains it.
            setting: Name of the setting that names *cert*, for the error message.

        Raises:
            FailedPrecondition: The files cannot be used.
        """
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._cert = cert
        self._key = key
        try:
            self._versions = self._file_versions()
            self.context.load_cert_chain(cert, key)
        except OSError as exc:
            raise FailedPrecondition(f"{setting}={cert}: {exc}") from exc

    def refresh(self) -> None:
        """Reload the files if they have changed; later connections use the new certificate."""
        try:
            versions = self._file_versions()
            if versions != self._versions:
                # If only one of the two files is replaced yet, this fails, and the next connection tries again.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
                self.context.load_cert_chain(self._cert, self._key)
                self._versions = versions
                _log.info("reloaded the certificate", file=str(self._cert))
        except OSError as exc:
            _log.error("cannot reload the certificate", file=str(self._cert), error=str(exc))

    def _file_versions(self) -> list[tuple[int, int, int]]:
        return [file_version(path) for path in (self._cert, self._key) if path is not None]
