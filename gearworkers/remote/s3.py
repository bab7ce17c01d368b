"""Blobs in S3 or a compatible store."""

from __future__ import annotations

import configparser
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from obstore.store import S3Store

from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound
from gearworkers.remote.bucket import BucketStore
from gearworkers.settings import RemoteSettings
from gearworkers.util.fs import read_small

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential

_OPTIONS = ("endpoint", "region", "virtual_host")
_REREAD_AFTER = timedelta(seconds=10)
_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30


def open_s3(url: str, settings: RemoteSettings) -> BucketStore:
    """Return the store at ``s3://bucket/prefix?endpoint=…&region=…&virtual_host=true``.

    The default region is AWS_REGION, else us-east-1. Credentials: the profile of the AWS tools' shared file, reread
    while the store is used, if the file has it; otherwise those that obstore finds (AWS_ACCESS_KEY_ID and so on,
    container and instance roles, web identity).

    Raises:
        InvalidInput: The URL has no bucket or an unknown option.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown or not parts.netloc:
        raise InvalidInput(f"{url}: s3://BUCKET/PREFIX is needed; known options are {', '.join(_OPTIONS)}")
    config: S3Config = {}
    if "region" in options:
        config["region"] = options["region"]
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
    }
    endpoint = options.get("endpoint")
    if endpoint is not None:
        config["endpoint"] = endpoint
        config["virtual_hosted_style_request"] = options.get("virtual_host") == "true"
        client["allow_http"] = endpoint.startswith("http://")
    profile = SharedCredentials(settings.aws_credentials_file, settings.aws_profile)
    store = S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        config=config,
        client_options=client,
        retry_config={"max_retries": 0},  # `RetryingStore` retries
        credential_provider=profile if profile.exists() else None,
    )
    return BucketStore(url.partition("?")[0], store)


class SharedCredentials:
    """A profile of the AWS tools' shared credentials file; a changed file takes effect within ten seconds."""

    def __init__(self, path: Path, profile: str) -> None:
        self._path = path
        self._profile = profile

    def exists(self) -> bool:
        """Return whether the file has the profile."""
        return self._section() is not None

    def __call__(self) -> S3Credential:
        """Return the credentials that obstore uses until it asks again.

        Raises:
            FailedPrecondition: The profile was removed, or lacks a key.
        """
        section = self._section()
        if section is None:
            raise FailedPrecondition(f"{self._path}: profile {self._profile} is missing")
        try:
            return {
                "access_key_id": section["aws_access_key_id"],
                "secret_access_key": section["aws_secret_access_key"],
                "token": section.get("aws_session_token"),
                "expires_at": datetime.now(UTC) + _REREAD_AFTER,
            }
        except KeyError as exc:
            raise FailedPrecondition(f"{self._path}: profile {self._profile} lacks {exc}") from exc

    def _section(self) -> configparser.SectionProxy | None:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(read_small(self._path).decode(), str(self._path))
        except NotFound:
            return None
        except UnicodeDecodeError as exc:  # the texts of both errors contain parts of the file
            raise FailedPrecondition(f"{self._path}: not UTF-8 at byte {exc.start}") from None
        except configparser.Error as exc:
            raise FailedPrecondition(f"{self._path}: not a file of profiles ({type(exc).__name__})") from None
        return parser[self._profile] if parser.has_section(self._profile) else None
