"""The syntax of bearer tokens, which the manager's client and HTTP services check."""

from __future__ import annotations

import re

BEARER_TOKEN = re.compile("[!-~]+")
"""A token: printable ASCII characters without spaces. The header allows fewer (RFC 6750, section 2.1)."""
