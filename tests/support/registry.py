"""A registry on loopback."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import Daemon

_CONFIG = """\
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@dataclass
class Registry:
    """A docker-registry that stores its data in a directory."""

    directory: Path
    port: int = 5000
    daemon: Daemon = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "config.yml"
        config.write_text(_CONFIG.format(storage=self.directory / "storage", port=self.port))
        command = ["docker-registry", "serve", str(config)]
        self.daemon = Daemon(command, self.directory / "registry.log", os.environ)

    @property
    def host(self) -> str:
        """The registry's part of an image name."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the registry; return when it listens."""
        self.daemon.start()
        self.daemon.wait_until(self._answers, "the registry's port")

    def stop(self) -> None:
        """Stop the registry."""
        self.daemon.stop()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
