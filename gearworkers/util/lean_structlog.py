"""Imports structlog without rich; the first import of a daemon.

structlog's console renderer imports rich for tracebacks that `util.log` does not use. In a daemon, rich and pygments
would take 3 to 4 MB. To structlog, rich is optional.
"""

from __future__ import annotations

import sys

if "structlog" not in sys.modules and "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment] # importing it raises ModuleNotFoundError
    import structlog  # noqa: F401

    del sys.modules["rich"]
