"""Containers: run, exec, cp, diff, commit and export, also many at once."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.dockerd import NO_NETWORK, Dockerd

AT_ONCE = 20


def started(dockerd: Dockerd, image: str = "tiny") -> str:
    """Start a container that sleeps; return its id."""
    return dockerd.run(image, "sleep", "1000", options=("-d",))


def test_exec_sees_files_that_the_container_wrote(dockerd: Dockerd) -> None:
    container = started(dockerd)
    dockerd.docker("exec", container, "sh", "-c", "echo written > /tmp/x")
    assert dockerd.docker("exec", container, "cat", "/tmp/x") == "written"


def test_files_are_copied_in_and_out(dockerd: Dockerd, tmp_path: Path) -> None:
    container = dockerd.docker("create", "tiny", "cat", "/etc/in")
    (tmp_path / "in").write_text("from outside\n")
    dockerd.docker("cp", str(tmp_path / "in"), f"{container}:/etc/in")
    assert dockerd.docker("start", "-a", container) == "from outside"
    dockerd.docker("cp", f"{container}:/etc/in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "from outside\n"
    running = started(dockerd)
    dockerd.docker("cp", str(tmp_path / "in"), f"{running}:/tmp/live")
    assert dockerd.docker("exec", running, "cat", "/tmp/live") == "from outside"


def test_diff_names_added_changed_and_deleted_files(dockerd: Dockerd) -> None:
    script = "echo x > /etc/new; chmod 600 /etc/debian_version; rm /etc/issue; mkdir /srv/d"
    container = dockerd.docker("create", *NO_NETWORK, "debian", "sh", "-c", script)
    dockerd.docker("start", "-a", container)
    assert sorted(dockerd.docker("diff", container).splitlines()) == [
        "A /etc/new",
        "A /srv/d",
        "C /etc",
        "C /etc/debian_version",
        "C /srv",
        "D /etc/issue",
    ]


def test_a_committed_container_is_an_image_with_its_changes(dockerd: Dockerd) -> None:
    script = "echo more >> /etc/issue; rm /etc/issue.net; chown -R 7:8 /usr/lib/os-release /etc/cron.daily"
    dockerd.run("debian", "sh", "-c", script, options=("--name", "changed"))
    dockerd.docker("commit", "changed", "committed")
    check = "tail -n1 /etc/issue; ls /etc/issue.net 2>/dev/null; stat -c %u:%g /etc/cron.daily /usr/lib/os-release"
    assert dockerd.run("committed", "sh", "-c", check) == "more\n7:8\n7:8"
    dockerd.docker("rmi", "committed")


def test_an_export_contains_the_merged_tree(dockerd: Dockerd) -> None:
    container = dockerd.docker("create", *NO_NETWORK, "tiny", "sh", "-c", "echo mine > /etc/mine; rm /bin/wc")
    dockerd.docker("start", "-a", container)
    exported = dockerd.call("export", container).stdout
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        names = tar.getnames()
        mine = tar.extractfile("etc/mine")
        assert mine is not None
        assert mine.read() == b"mine\n"
    assert "bin/busybox" in names
    assert "bin/wc" not in names


def test_writes_of_a_container_are_invisible_to_others(dockerd: Dockerd) -> None:
    first, second = started(dockerd), started(dockerd)
    dockerd.docker("exec", first, "sh", "-c", "echo 1 > /etc/x; rm /bin/wc; chmod 700 /bin/busybox")
    shown = dockerd.docker("exec", second, "sh", "-c", "test -e /etc/x || echo absent; stat -c %a /bin/busybox")
    assert shown == "absent\n755"
    assert dockerd.docker("exec", second, "wc", "-c", "/dev/null") == "0 /dev/null"


def test_a_stopped_container_keeps_its_files(dockerd: Dockerd) -> None:
    container = dockerd.docker("create", *NO_NETWORK, "tiny", "sh", "-c", "cat /kept 2>/dev/null; echo kept > /kept")
    assert dockerd.docker("start", "-a", container) == ""
    assert dockerd.docker("start", "-a", container) == "kept"


def test_twenty_containers_run_at_once(dockerd: Dockerd) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outputs = list(pool.map(lambda n: dockerd.run("debian", "sh", "-c", f"echo {n} > /n; cat /n"), range(AT_ONCE)))
    assert outputs == [str(n) for n in range(AT_ONCE)]
    assert dockerd.docker("ps", "-aq") == ""
