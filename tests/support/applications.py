"""Five typical applications: the contents of their images, and requests that show when they answer.

Each image has the contents of Docker Hub's default tag of that program, from Debian's packages: a base, the program,
then the application's own files (`apps/`). Two also have the build tools of Docker Hub's `python` and `node` images.
"""

from __future__ import annotations

import http.client
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FILES = Path(__file__).parent / "apps"
HOST = "127.0.0.1"
"""Containers share the sandbox's network, so requests come from outside the container."""
_PATIENCE_S = 120.0
_POLL_S = 0.005


@dataclass(frozen=True)
class Step:
    """The recipe of one layer.

    Args:
        packages: Names of Debian packages, separated by spaces.
        commands: Shell commands, run in the image's root after packages and files are installed.
        files: Whether the layer includes the application's own files.
        privileged: A program that gets the capability to listen on ports below 1024, which is an xattr.
    """

    packages: str = ""
    commands: tuple[str, ...] = ()
    files: bool = False
    privileged: str = ""


@dataclass(frozen=True)
class Application:
    """An application and its image."""

    name: str
    steps: tuple[Step, ...]
    """The layers above the base."""
    program: str
    """The program's Debian packages, as patterns for apt."""
    config: dict[str, object]
    """The image config's `config`."""
    port: int
    ask: Callable[[int], bytes]
    """Sends a request to the port; returns the answer. Raises OSError or HTTPException until there is one."""

    def answer(self) -> bytes:
        """Send one request; return the answer.

        Raises:
            OSError, http.client.HTTPException: The application does not answer yet.
        """
        return self.ask(self.port)

    def wait(self, timeout_s: float = _PATIENCE_S) -> bytes:
        """Repeat the request until there is an answer; return it.

        Raises:
            TimeoutError: The application did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return self.answer()
            except (OSError, http.client.HTTPException) as exc:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{self.name} does not answer within {timeout_s:g} s: {exc}") from exc
                time.sleep(_POLL_S)


def _get(*paths: str) -> Callable[[int], bytes]:
    """Return a function that gets pages one after the other over HTTP; each must have status 200."""

    def ask(port: int) -> bytes:
        found = []
        for path in paths:
            connection = http.client.HTTPConnection(HOST, port, timeout=_PATIENCE_S)
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                if response.status != 200:
                    raise http.client.HTTPException(f"{path}: {response.status}")
                found.append(response.read())
            finally:
                connection.close()
        return b"\n".join(found)

    return ask


def _query(text: str) -> Callable[[int], bytes]:
    """Return a function that queries PostgreSQL; its answer is the row messages of the protocol.

    Source: PostgreSQL documentation, "Frontend/Backend Protocol", message formats.
    """

    def ask(port: int) -> bytes:
        with (
            socket.create_connection((HOST, port), timeout=_PATIENCE_S) as connection,
            connection.makefile("rb") as file,
        ):
            settings = b"user\0postgres\0database\0postgres\0\0"
            connection.sendall(struct.pack(">II", 8 + len(settings), 3 << 16) + settings)
            _messages(file.read)
            query = text.encode() + b"\0"
            connection.sendall(b"Q" + struct.pack(">I", 4 + len(query)) + query)
            return b"".join(body for kind, body in _messages(file.read) if kind == b"D")

    return ask


def _messages(read: Callable[[int], bytes]) -> list[tuple[bytes, bytes]]:
    """Read the messages up to ReadyForQuery."""
    found: list[tuple[bytes, bytes]] = []
    while not found or found[-1][0] != b"Z":
        head = read(5)
        if len(head) < 5:
            raise ConnectionError("PostgreSQL closed the connection")
        kind, size_bytes = struct.unpack(">cI", head)
        body = read(size_bytes - 4)
        if kind == b"E":
            raise ConnectionError(body.decode(errors="replace"))
        found.append((kind, body))
    return found


BUILD_TOOLS = Step(
    "build-essential ca-certificates curl git gnupg libffi-dev libpq-dev libsqlite3-dev libssl-dev libxml2-dev "
    "procps unzip wget zlib1g-dev"
)

NGINX = Application(
    "nginx",
    (
        Step(
            "ca-certificates curl nginx libnginx-mod-http-geoip libnginx-mod-http-image-filter "
            "libnginx-mod-http-xslt-filter libnginx-mod-stream",
            # As in the official image, `docker logs` shows the logs.
            ("ln -sf /dev/stdout /var/log/nginx/access.log", "ln -sf /dev/stderr /var/log/nginx/error.log"),
        ),
        Step(
            "debian-faq",
            (
                "cp -rL /usr/share/doc/debian/FAQ /srv/www/faq",
                "find /srv/www/faq -name '*[aeiou].en.html' -exec sed -i 's|</body>|<p>@RELEASE@</p></body>|' {} +",
            ),
            files=True,
        ),
    ),
    "nginx* libnginx*",
    {"Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGQUIT"},
    18081,
    _get("/", "/faq/index.en.html"),
)

POSTGRES = Application(
    "postgres",
    (
        Step(
            "postgresql-common locales",
            (
                "sed -i 's/^#\\?create_main_cluster.*/create_main_cluster = false/' "
                "/etc/postgresql-common/createcluster.conf",
                "localedef -i en_US -c -f UTF-8 -A /usr/share/locale/locale.alias en_US.UTF-8",
            ),
        ),
        Step("postgresql"),
        Step("", ("install -d -o postgres -g postgres -m 0700 /var/lib/postgresql/data",), files=True),
    ),
    "postgresql* libpq5",
    {
        "Entrypoint": ["docker-entrypoint.sh"],
        "Env": ["LANG=en_US.utf8", "PGDATA=/var/lib/postgresql/data"],
        "User": "postgres",
        "StopSignal": "SIGINT",
    },
    18082,
    _query("select count(*), sum(price), max(release.name) from article, release"),
)

PYTHON = Application(
    "python",
    (
        BUILD_TOOLS,
        Step("python3 python3-dev python3-pip python3-venv"),
        Step("gunicorn python3-django python3-pil python3-psycopg2 python3-redis python3-requests python3-yaml"),
        Step("", ("cd /srv/app && python3 manage.py migrate",), files=True),
    ),
    "python3* libpython3* gunicorn",
    {
        "Cmd": ["gunicorn", "--workers=2", "--bind=127.0.0.1:18083", "shop.wsgi"],
        "Env": ["PYTHONDONTWRITEBYTECODE=1"],
        "WorkingDir": "/srv/app",
    },
    18083,
    _get("/"),
)

NODE = Application(
    "node",
    (
        BUILD_TOOLS,
        Step("nodejs", ("ln -sf node /usr/bin/js",)),
        Step("node-ejs node-express node-lodash node-moment"),
        Step(files=True, privileged="usr/bin/node"),
    ),
    "nodejs libnode*",
    {"Cmd": ["node", "server.js"], "Env": ["NODE_PATH=/usr/share/nodejs"], "WorkingDir": "/srv/app"},
    18084,
    _get("/"),
)

JVM = Application(
    "jvm",
    (
        Step("ca-certificates default-jre-headless"),
        Step("tomcat10", ('sed -i \'s/port="8080"/port="18085"/\' /etc/tomcat10/server.xml',)),
        Step("", ("rm -f /var/lib/tomcat10/webapps/ROOT/index.html",), files=True),
    ),
    "openjdk-* default-jre* tomcat* libtomcat*",
    {
        "Cmd": ["/usr/share/tomcat10/bin/catalina.sh", "run"],
        "Env": [
            "JAVA_HOME=/usr/lib/jvm/default-java",
            "CATALINA_HOME=/usr/share/tomcat10",
            "CATALINA_BASE=/var/lib/tomcat10",
        ],
    },
    18085,
    _get("/index.jsp"),
)

APPLICATIONS = (NGINX, POSTGRES, PYTHON, NODE, JVM)
