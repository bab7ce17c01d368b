"""Compatibility with GNU tar, bsdtar, Python's tarfile and Docker, in both directions."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearworkers.tar.entry import CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry
from gearworkers.tar.reader import TarReader
from gearworkers.tar.writer import END, header, padding
from tests.support.tars import ReadTar, read_tar

DATA = Path(__file__).parents[2] / "data"
MTIME_NS = 1_234_567_890_123_456_789
LONG = b"d/" + b"n" * 180
SPARSE_BYTES = 3_000_000
SPARSE_PARTS = range(100_000, SPARSE_BYTES, 250_000)
TARFILE_TYPES = {
    tarfile.REGTYPE: REG,
    tarfile.AREGTYPE: REG,
    tarfile.LNKTYPE: HARDLINK,
    tarfile.SYMTYPE: SYMLINK,
    tarfile.CHRTYPE: CHAR,
    tarfile.DIRTYPE: DIR,
    tarfile.FIFOTYPE: FIFO,
}


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A directory `d` with one file of each type."""
    top = os.fsencode(tmp_path)
    os.mkdir(top + b"/d")
    for name, content in ((b"d/file", b"content\n" * 999), (b"d/empty", b""), (b"d/\xc3\xbc", b"umlaut")):
        Path(os.fsdecode(top + b"/" + name)).write_bytes(content)
    os.link(top + b"/d/file", top + b"/d/hard")
    os.symlink(b"file", top + b"/d/soft")
    os.mkfifo(top + b"/d/fifo")
    os.chmod(top + b"/d/file", 0o4755)
    for name in (b"d/file", b"d/empty"):
        os.utime(top + b"/" + name, ns=(MTIME_NS, MTIME_NS))
    yield tmp_path


def run(tree: Path, *command: str | bytes) -> bytes:
    return subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, check=True, env={"LC_ALL": "C.UTF-8"}).stdout


def add(tree: Path, name: bytes, content: bytes = b"more") -> None:
    Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(content)


def add_sparse(tree: Path) -> bytes:
    with open(tree / "d" / "sparse", "wb") as file:
        for part in SPARSE_PARTS:
            file.seek(part)
            file.write(b"data at %d" % part)
        file.truncate(SPARSE_BYTES)
    return (tree / "d" / "sparse").read_bytes()


def check(read: ReadTar, tar: bytes, tree: Path, *, nanoseconds: bool) -> None:
    """Check that the tar describes *tree* and can be replayed."""
    assert read.rebuilt() == tar
    names = {os.fsencode(path.relative_to(tree)) for path in tree.rglob("*")}
    assert {entry.name.rstrip(b"/") for entry in read.entries} == names
    by_inode: dict[int, bytes] = {}
    for entry, content in read.files:
        path = os.fsencode(tree) + b"/" + entry.name
        stat = os.lstat(path)
        assert (entry.uid, entry.gid) == (stat.st_uid, stat.st_gid)
        if entry.type != SYMLINK:  # bsdtar and GNU tar differ here
            assert entry.mode == stat.st_mode & 0o7777, entry.name
        assert entry.mtime_ns == (stat.st_mtime_ns if nanoseconds else stat.st_mtime_ns // 10**9 * 10**9)
        if entry.type == REG:
            assert content == Path(os.fsdecode(path)).read_bytes(), entry.name
            by_inode[stat.st_ino] = entry.name
        elif entry.type == HARDLINK:
            assert entry.linkname == by_inode[stat.st_ino]
        elif entry.type == SYMLINK:
            assert entry.linkname == os.readlink(path)


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_gnu_tar_are_read(tree: Path, tar_format: str) -> None:
    if tar_format == "v7":
        os.unlink(tree / "d" / "fifo")
    if tar_format not in ("v7", "ustar"):
        add(tree, LONG)
        add(tree, b"d/\xff\xfe")
    tar = run(tree, "tar", f"--format={tar_format}", "-cf", "-", "d")
    check(read_tar(tar), tar, tree, nanoseconds=tar_format == "posix")


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_sparse_files_of_gnu_tar_are_read_and_replayed(tree: Path, options: list[str]) -> None:
    content = add_sparse(tree)
    tar = run(tree, "tar", "-S", *options, "-cf", "-", "d")
    read = read_tar(tar)
    entry = next(entry for entry in read.entries if entry.name == b"d/sparse")
    assert entry.sparse is not None and len(entry.sparse) >= len(SPARSE_PARTS)
    assert (entry.size_bytes, read.content(b"d/sparse")) == (SPARSE_BYTES, content)
    assert entry.stored_bytes < SPARSE_BYTES / 2
    check(read, tar, tree, nanoseconds="--format=posix" in options)


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_a_sparse_file_beyond_4_gib_is_read_with_its_size_and_its_segment(tree: Path, tar_format: str) -> None:
    size_bytes = 9 << 30
    with open(tree / "d" / "sparse", "wb") as file:
        file.seek(size_bytes - 4096)
        file.write(b"e" * 4096)
    tar = run(tree, "tar", "-S", f"--format={tar_format}", "-cf", "-", "d/sparse")
    (entry,) = TarReader(io.BytesIO(tar))
    assert (entry.size_bytes, entry.stored_bytes) == (size_bytes, 4096)
    assert entry.sparse is not None and entry.sparse[0] == (size_bytes - 4096, 4096)


@pytest.mark.parametrize("tar_format", ["pax", "ustar", "gnutar", "v7"])
def test_tars_of_bsdtar_are_read(tree: Path, tar_format: str) -> None:
    if tar_format == "v7":
        os.unlink(tree / "d" / "fifo")
    if tar_format in ("pax", "gnutar"):
        add(tree, LONG)
    if tar_format == "pax":
        add_sparse(tree)
    tar = run(tree, "bsdtar", "--format", tar_format, "-cf", "-", "d")
    check(read_tar(tar), tar, tree, nanoseconds=tar_format == "pax")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_pythons_tarfile_are_read(tree: Path, tar_format: int) -> None:
    if tar_format != tarfile.USTAR_FORMAT:
        add(tree, LONG)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        tar.add(tree / "d", "d")
    read = read_tar(file.getvalue())
    assert read.rebuilt() == file.getvalue()
    if tar_format != tarfile.PAX_FORMAT:
        check(read, file.getvalue(), tree, nanoseconds=False)
    else:  # its times are floats
        assert read.content(LONG) == b"more"


def test_xattrs_of_gnu_tar_are_read(tree: Path) -> None:
    os.setxattr(tree / "d" / "file", "user.binary", bytes(range(256)))
    os.setxattr(tree / "d" / "file", "trusted.empty", b"")
    tar = run(tree, "tar", "--xattrs", "--xattrs-include=*", "--format=posix", "-cf", "-", "d/file")
    (entry,) = read_tar(tar).entries
    assert entry.xattrs == {b"user.binary": bytes(range(256)), b"trusted.empty": b""}


def docker_layers() -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress((DATA / "docker-save.tar.gz").read_bytes()))) as save:
        manifest = save.extractfile("manifest.json")
        assert manifest is not None
        layers = sorted({layer for image in json.load(manifest) for layer in image["Layers"]})
        return {layer: save.extractfile(layer).read() for layer in layers}  # type: ignore[union-attr]


def check_against_tarfile(tar: bytes) -> ReadTar:
    """Check that Python's tarfile reads the same files from *tar*; return them."""
    read = read_tar(tar)
    assert read.rebuilt() == tar
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape", encoding="utf-8") as other:
        members = other.getmembers()
        assert len(members) == len(read.files)
        for (entry, content), member in zip(read.files, members, strict=True):
            assert entry.name.rstrip(b"/") == os.fsencode(member.name)
            assert (entry.type, entry.linkname) == (TARFILE_TYPES[member.type], os.fsencode(member.linkname))
            assert (entry.mode, entry.uid, entry.gid) == (member.mode & 0o7777, member.uid, member.gid)
            assert abs(entry.mtime_ns - member.mtime * 10**9) < 1000
            if entry.type == REG:
                file = other.extractfile(member)
                assert file is not None and file.read() == content
    return read


def test_layers_of_docker_save_are_read() -> None:
    """The image is from Docker 20.10; `docker import`, the classic builder and BuildKit made one layer each."""
    layers = docker_layers()
    assert len(layers) == 3
    reads = [check_against_tarfile(tar) for tar in layers.values()]
    names = {entry.name for read in reads for entry in read.entries}
    assert "copied/grüße.txt".encode() in names
    assert max(map(len, names)) > 255
    assert {entry.uid for read in reads for entry in read.entries} == {0, 4_000_000}
    assert {entry.mode for read in reads for entry in read.entries} >= {0o4755}


def test_the_outer_tar_of_docker_save_is_read() -> None:
    check_against_tarfile(gzip.decompress((DATA / "docker-save.tar.gz").read_bytes()))


# -- tars of the writer


def written_files() -> list[tuple[TarEntry, bytes]]:
    return [
        (TarEntry(b"d/", DIR, mode=0o755, mtime_ns=MTIME_NS), b""),
        (TarEntry(b"d/file", mode=0o4755, uid=70_000_000, gid=8, size_bytes=5, mtime_ns=10**9), b"hello"),
        (TarEntry(b"d/before-1970", mtime_ns=-2_000_000_000), b""),
        (TarEntry(b"d/hard", HARDLINK, b"d/file", mode=0o4755, uid=70_000_000, gid=8, mtime_ns=10**9), b""),
        (TarEntry(b"d/soft", SYMLINK, b"t/" * 100, mode=0o777), b""),
        (TarEntry(b"d/fifo", FIFO), b""),
        (TarEntry(b"d/null", CHAR, devmajor=1, devminor=3), b""),
        (TarEntry(b"d/" + b"split/" * 30 + b"f" * 90, size_bytes=3, mtime_ns=10**9), b"abc"),
        (TarEntry(b"d/" + b"f" * 250, size_bytes=600), b"x" * 600),
        (TarEntry("d/grün".encode(), size_bytes=1), b"u"),
        (TarEntry(b"d/\xff\xfe", size_bytes=1), b"b"),
    ]


def as_tar(files: list[tuple[TarEntry, bytes]]) -> bytes:
    return b"".join(header(entry) + content + padding(len(content)) for entry, content in files) + END


def test_the_reader_returns_the_entries_that_the_writer_wrote() -> None:
    read = read_tar(as_tar(written_files()))
    for (entry, content), (expected, expected_content) in zip(read.files, written_files(), strict=True):
        entry.header_offset = 0
        expected.stored_bytes = expected.size_bytes
        assert (entry, content) == (expected, expected_content)


def test_pythons_tarfile_reads_tars_of_the_writer() -> None:
    check_against_tarfile(as_tar(written_files()))


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_gnu_tar_and_bsdtar_extract_tars_of_the_writer(tmp_path: Path, program: str) -> None:
    files = written_files()
    options = ["--delay-directory-restore"] if program == "tar" else []
    command = [program, *options, "--numeric-owner", "-xpf", "-"]
    subprocess.run(command, cwd=tmp_path, input=as_tar(files), check=True, env={"LC_ALL": "C.UTF-8"})
    for entry, content in files:
        path = os.fsencode(tmp_path) + b"/" + entry.name
        stat = os.lstat(path)
        assert (stat.st_uid, stat.st_gid, stat.st_mtime_ns) == (entry.uid, entry.gid, entry.mtime_ns), entry.name
        assert stat.st_mode & 0o7777 == entry.mode
        if entry.type == REG:
            assert Path(os.fsdecode(path)).read_bytes() == content
    assert os.lstat(tmp_path / "d" / "hard").st_ino == os.lstat(tmp_path / "d" / "file").st_ino
    assert os.lstat(tmp_path / "d" / "null").st_rdev == os.makedev(1, 3)


def test_gnu_tar_restores_xattrs_that_the_writer_wrote(tmp_path: Path) -> None:
    xattrs = {b"user.binary": bytes(range(256)), b"user.text": b"a=b\nc"}
    tar = as_tar([(TarEntry(b"f", xattrs=xattrs), b"")])
    subprocess.run(["tar", "--xattrs", "--xattrs-include=*", "-xf", "-"], cwd=tmp_path, input=tar, check=True)
    assert {name: os.getxattr(tmp_path / "f", name) for name in os.listxattr(tmp_path / "f")} == {
        os.fsdecode(name): value for name, value in xattrs.items()
    }
