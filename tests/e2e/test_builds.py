"""`docker build` with the classic builder and with BuildKit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.dockerd import Dockerd

DOCKERFILE = r"""
FROM debian
COPY added/ /added/
RUN echo one > /one && ln /one /hard && ln -s one /soft
RUN chown -R 1000:1001 /added && chmod 4755 /added/tool
RUN mv /usr/share/doc /usr/share/moved && rm -r /usr/share/man
RUN mkfifo /fifo && mkdir /usr/share/man && echo new > /usr/share/man/new
RUN mv /added/inner /added/renamed && echo changed >> /added/renamed/file
RUN rm -r /added/renamed && mkdir /added/renamed && echo again > /added/renamed/again
WORKDIR /work
RUN pwd > where && touch -d @1234567890.123456789 stamped
ADD archive.txt /work/
"""
CHECKS = {
    "cat /one /hard /soft": "one\none\none",
    "stat -c %h /one": "2",
    "stat -c '%a %u:%g' /added/tool": "4755 1000:1001",
    "test -d /usr/share/moved && ls -d /usr/share/doc 2>/dev/null || echo moved": "moved",
    "ls /usr/share/man": "new",
    "ls /added/renamed": "again",
    "cat /work/where /work/archive.txt": "/work\narchived",
    "stat -c '%F' /fifo": "fifo",
}


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_a_build_of_many_steps_makes_the_expected_tree(dockerd: Dockerd, tmp_path: Path, buildkit: bool) -> None:
    context = tmp_path / "context"
    (context / "added" / "inner").mkdir(parents=True)
    (context / "added" / "tool").write_text("#!/bin/sh\n")
    (context / "added" / "inner" / "file").write_text("inner\n")
    (context / "archive.txt").write_text("archived\n")
    (context / "Dockerfile").write_text(DOCKERFILE)
    dockerd.docker("build", "--network", "none", "-t", "built", str(context), buildkit=buildkit)
    found = {check: dockerd.run("built", "sh", "-c", check) for check in CHECKS}
    assert found == CHECKS
    dockerd.docker("rmi", "built")


def test_a_build_uses_the_cache_of_an_earlier_one(dockerd: Dockerd) -> None:
    first = b"FROM tiny\nRUN echo 1 > /one\n"
    dockerd.docker("build", "-t", "cached", "-", stdin=first)
    again = dockerd.docker("build", "-t", "cached", "-", stdin=first + b"RUN echo 2 > /two\n")
    assert "Using cache" in again
    assert dockerd.run("cached", "cat", "/one", "/two") == "1\n2"
    dockerd.docker("rmi", "cached")


def test_a_multi_stage_build_copies_between_stages(dockerd: Dockerd) -> None:
    text = b"FROM tiny AS made\nRUN echo made > /made\nFROM tiny\nCOPY --from=made /made /got\n"
    dockerd.docker("build", "-t", "staged", "-", stdin=text)
    assert dockerd.run("staged", "sh", "-c", "cat /got; test -e /made || echo absent") == "made\nabsent"
    dockerd.docker("rmi", "staged")


def test_a_failing_step_leaves_no_image_and_the_next_build_works(dockerd: Dockerd) -> None:
    assert dockerd.call("build", "-t", "failed", "-", stdin=b"FROM tiny\nRUN false\n").returncode != 0
    assert dockerd.call("image", "inspect", "failed").returncode != 0
    dockerd.docker("build", "-t", "fine", "-", stdin=b"FROM tiny\nRUN true\n")
    dockerd.docker("rmi", "fine")
