"""Logging of all processes: structlog and the standard library, in one format on stderr."""

from __future__ import annotations

import logging
import sys

import structlog

from gearworkers.settings import LogSettings, Settings, unknown_variables


def configure_logging(settings: LogSettings) -> None:
    """Send all logs to stderr, as text or as JSON; replaces any earlier configuration."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(settings.format)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())


def warn_of_unknown_variables() -> None:
    """Log a warning for each GEAR_ variable in the environment that is not a setting."""
    for problem in unknown_variables():
        structlog.get_logger(__name__).warning(problem)


def command_settings() -> Settings:
    """Return the settings of a `gear` command, and configure its logging.

    Raises:
        InvalidInput: As `Settings.from_environ`.
    """
    settings = Settings.from_environ()
    configure_logging(settings.log)
    return settings


def _renderers(log_format: str) -> list[structlog.typing.Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
