"""Prometheus' text format over HTTP."""

from __future__ import annotations

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content-Type of a page in the text format.

Source: Prometheus documentation, "Exposition formats", "Text-based format".
"""
