"""Copies of trees with hard links in several layers keep the links and the contents.

Docker's archive code, containerd's copy code and BuildKit detect hard links by the inode number alone. If files of two
layers had the same number, a copy would give one of them the contents of the other.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable

import pytest

from tests.support.dockerd import NO_NETWORK, Dockerd
from tests.support.stack import Stack

Contents = dict[str, str]

LINKED = b"""
FROM tiny
RUN mkdir /d && echo first > /d/a1 && ln /d/a1 /d/a2
RUN echo second > /d/b1 && ln /d/b1 /d/b2
RUN echo third > /d/c1 && ln /d/c1 /d/c2
"""
OTHER = b"""
FROM tiny
RUN mkdir /d && echo other > /d/a1 && ln /d/a1 /d/a2
"""
IN_IMAGE = {"a1": "first", "a2": "first", "b1": "second", "b2": "second", "c1": "third", "c2": "third"}
IN_OTHER = {"other/a1": "other", "other/a2": "other"}
WRITE = "echo new > /d/n1; ln /d/n1 /d/n2; echo changed > /d/c1; ln /d/c2 /d/c3"
WRITTEN = IN_IMAGE | {"n1": "new", "n2": "new", "c1": "changed", "c3": "third"}
SHOW = "cd %s && find . -type f | while read f; do echo $f $(stat -c %%h $f) $(cat $f); done"


@pytest.fixture(scope="session")
def images(session_dockerd: Dockerd) -> None:
    """Build the images `linked`, which has links in several layers, and `other`."""
    for name, dockerfile in (("linked", LINKED), ("other", OTHER)):
        session_dockerd.docker("build", *NO_NETWORK, "-t", name, "-", stdin=dockerfile)


@pytest.fixture
def written(dockerd: Dockerd, images: None) -> str:
    """Run a container of `linked` that makes new links and writes to files of the image; return its id."""
    container = dockerd.docker("create", *NO_NETWORK, "linked", "sh", "-c", WRITE)
    dockerd.docker("start", "-a", container)
    return container


def in_tar(tar_bytes: bytes) -> Contents:
    """Return the contents of the files below d/ by name, hard links included."""
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        members = [member for member in tar if member.name.startswith("d/") and not member.isdir()]
        return {member.name.removeprefix("d/"): _read(tar, member).decode().strip() for member in members}


def links_in_tar(tar_bytes: bytes) -> set[frozenset[str]]:
    """Return the pairs of names below d/ that the tar links."""
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        return {frozenset((member.name[2:], member.linkname[2:])) for member in tar if member.islnk()}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def exported(dockerd: Dockerd, container: str) -> bytes:
    return dockerd.call("export", container).stdout


def copied_out(dockerd: Dockerd, container: str) -> bytes:
    return dockerd.call("cp", f"{container}:/d", "-").stdout


def shown(dockerd: Dockerd, image: str, directory: str, *options: str) -> tuple[Contents, list[str]]:
    """Return the contents of the files in a directory of an image, and the names of files with two links."""
    lines = dockerd.run(image, "sh", "-c", SHOW % directory, options=("--rm", *options)).splitlines()
    found = [line.removeprefix("./").split(" ", 2) for line in lines]
    return {name: content for name, _, content in found}, sorted(name for name, links, _ in found if links == "2")


TARS = [exported, copied_out]
BUILDERS = pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])


@pytest.mark.parametrize("copied", TARS, ids=lambda copied: str(copied.__name__))
def test_a_tar_of_a_container_keeps_links_of_image_and_container(
    dockerd: Dockerd, written: str, copied: Callable[[Dockerd, str], bytes]
) -> None:
    tar = copied(dockerd, written)
    assert in_tar(tar) == WRITTEN
    assert links_in_tar(tar) == {frozenset(pair) for pair in (("a1", "a2"), ("b1", "b2"), ("c2", "c3"), ("n1", "n2"))}


@pytest.mark.parametrize("copied", TARS, ids=lambda copied: str(copied.__name__))
def test_a_tar_of_an_image_keeps_the_links_of_each_layer(
    dockerd: Dockerd, images: None, copied: Callable[[Dockerd, str], bytes]
) -> None:
    tar = copied(dockerd, dockerd.docker("create", "linked", "true"))
    assert in_tar(tar) == IN_IMAGE
    assert links_in_tar(tar) == {frozenset(pair) for pair in (("a1", "a2"), ("b1", "b2"), ("c1", "c2"))}


def test_a_new_volume_gets_the_files_of_the_image(dockerd: Dockerd, images: None) -> None:
    assert shown(dockerd, "linked", "/d", "-v", "/d") == (IN_IMAGE, sorted(IN_IMAGE))


@BUILDERS
def test_a_stage_is_copied_with_its_links(dockerd: Dockerd, images: None, buildkit: bool) -> None:
    dockerfile = f"FROM linked AS made\nRUN {WRITE}\nFROM tiny\nCOPY --from=made /d /copied\n"
    dockerd.docker("build", *NO_NETWORK, "-t", "copied", "-", stdin=dockerfile.encode(), buildkit=buildkit)
    assert shown(dockerd, "copied", "/copied") == (WRITTEN, ["a1", "a2", "b1", "b2", "c2", "c3", "n1", "n2"])
    dockerd.docker("rmi", "copied")


@BUILDERS
def test_files_of_two_images_in_one_keep_their_contents(dockerd: Dockerd, images: None, buildkit: bool) -> None:
    dockerfile = b"FROM linked\nCOPY --from=other /d /d/other\n"
    dockerd.docker("build", *NO_NETWORK, "-t", "both", "-", stdin=dockerfile, buildkit=buildkit)
    for copied in TARS:
        assert in_tar(copied(dockerd, dockerd.docker("create", "both", "true"))) == IN_IMAGE | IN_OTHER
    assert shown(dockerd, "both", "/d", "-v", "/d")[0] == IN_IMAGE | IN_OTHER
    dockerd.docker("rm", "-f", *dockerd.docker("ps", "-aq").split())
    dockerd.docker("rmi", "both")


def test_a_volume_that_another_image_filled_keeps_its_contents(dockerd: Dockerd, images: None) -> None:
    dockerd.run("other", "true", options=("--rm", "-v", "filled:/d"))
    container = dockerd.docker("create", "-v", "filled:/d/other", "linked", "true")
    assert in_tar(copied_out(dockerd, container)) == IN_IMAGE | IN_OTHER
    dockerd.docker("rm", container)
    dockerd.docker("volume", "rm", "filled")


def test_numbers_and_copies_are_the_same_after_restarts(dockerd: Dockerd, stack: Stack, written: str) -> None:
    show_numbers = ("stat", "-c", "%i", "/d/a1", "/d/a2", "/d/b1", "/d/b2")
    before = dockerd.run("linked", *show_numbers)
    stack.stop("gateway")
    stack.start("gateway")
    dockerd.restart()
    assert dockerd.run("linked", *show_numbers) == before
    for copied in TARS:
        assert in_tar(copied(dockerd, written)) == WRITTEN
    assert shown(dockerd, "linked", "/d", "-v", "/d") == (IN_IMAGE, sorted(IN_IMAGE))


def test_trees_linked_in_two_steps_are_copied_with_the_right_contents(dockerd: Dockerd) -> None:
    dockerfile = b"FROM debian\nRUN mkdir /d && cp -al /usr/share/doc /d/one\nRUN cp -al /usr/share/man /d/two\n"
    dockerd.docker("build", *NO_NETWORK, "-t", "twice", "-", stdin=dockerfile)
    listed = dockerd.run("twice", "sh", "-c", "cd /d && find . -type f -exec sha256sum {} +").splitlines()
    expected = {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in listed)}
    copied = copied_out(dockerd, dockerd.docker("create", "twice", "true"))
    with tarfile.open(fileobj=io.BytesIO(copied)) as tar:
        files = [member for member in tar if member.isreg() or member.islnk()]
        found = {member.name.removeprefix("d/"): hashlib.sha256(_read(tar, member)).hexdigest() for member in files}
    assert len(expected) > 1000
    assert {name for name in expected if found[name] != expected[name]} == set()
    dockerd.docker("rm", *dockerd.docker("ps", "-aq").split())
    dockerd.docker("rmi", "twice")
