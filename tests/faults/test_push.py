"""Pending pushes survive crashes, the garbage collector and an unreachable remote; no new object is forgotten."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import RefWriter
from gearworkers.cas.store import ObjectStore
from gearworkers.engine.engine import Engine
from gearworkers.errors import GearError, IntegrityError
from gearworkers.remote import encoding
from gearworkers.remote.directory import DirectoryStore
from gearworkers.remote.push import PushReport, push_pending
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings, Settings
from plugin_gateway.graphdriver.driver import GearDriver
from tests.conformance.drivers import InProcess, new_layer_id
from tests.conformance.layers import apply_layer, file, mounted, tar
from tests.faults.crashes import Report, killed_at_every_step, run_child

CONTENTS = [b"small", b"another", b"large " * 900_000]
DATA = tar(*(file(f"f{number}", content) for number, content in enumerate(CONTENTS)))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = settings_in(tmp_path)
    Path(settings.remote.url).mkdir()
    InProcess(settings)
    return settings


def settings_in(root: Path) -> Settings:
    return replace(
        Settings(),
        gear_root=root / "gear",
        run_dir=root / "run",
        node="test",
        remote=RemoteSettings(url=str(root / "remote")),
    )


def pushed(settings: Settings) -> set[str]:
    """Return the digests of the CONTENTS that the remote holds; read as files, since this process forks children."""
    return {name for name in WANTED if blob_path(settings, name).exists() and content(settings, name) in CONTENTS}


def blob_path(settings: Settings, name: str) -> Path:
    return Path(settings.remote.url) / "objects" / name[:2] / name


def content(settings: Settings, name: str) -> bytes:
    digest, blob = bytes.fromhex(name), blob_path(settings, name).read_bytes()
    if not encoding.is_layout(blob):
        return encoding.decode(digest, blob)
    return b"".join(content(settings, chunk.digest.hex()) for chunk in encoding.decode_layout(digest, blob))


def push(settings: Settings) -> None:
    """Push in a child process."""
    outcome = run_child(lambda _: _push(settings))
    assert not outcome.failed, outcome.reported


def _push(settings: Settings) -> None:
    Engine.of(settings).push_pending()


def empty_remote(settings: Settings) -> None:
    shutil.rmtree(settings.remote.url)
    (Path(settings.remote.url) / "objects").mkdir(parents=True)


def pending_count(settings: Settings) -> int:
    return len(list(settings.gear_push_path.iterdir()))


WANTED = {hashlib.sha256(content).hexdigest() for content in CONTENTS}


def test_new_objects_are_pushed_once(settings: Settings) -> None:
    driver = InProcess(settings)
    apply_layer(driver, *(file(f"f{number}", content) for number, content in enumerate(CONTENTS)))
    assert Engine.of(settings).push_pending().pushed_objects == len(CONTENTS)
    assert pushed(settings) == WANTED
    apply_layer(driver, file("again", CONTENTS[0]))
    assert Engine.of(settings).push_pending().pushed_objects == 0
    assert pending_count(settings) == 0


def test_a_commits_new_objects_are_pushed(settings: Settings) -> None:
    driver = InProcess(settings)
    base, id, image = apply_layer(driver, file("base", b"base")), new_layer_id(), new_layer_id()
    driver.create_read_write(id, base)
    with mounted(driver, id) as merged:
        (merged / "new").write_bytes(CONTENTS[0])
    driver.create(image, base)
    driver.apply_diff(image, base, driver.diff(id, base))
    Engine.of(settings).push_pending()
    assert hashlib.sha256(CONTENTS[0]).hexdigest() in pushed(settings)


def test_a_push_killed_at_any_step_is_finished_by_the_next(settings: Settings) -> None:
    """The test runs in a new process, since obstore does not work in children of a process that has used it."""
    root = str(settings.gear_root.parent)
    subprocess.run([sys.executable, "-m", "tests.faults.test_push", root], check=True)


def push_killed_at_every_step(settings: Settings) -> None:
    def work(report: Report) -> None:
        Engine.of(settings).push_pending()

    driver = InProcess(settings)
    driver.create("layer")
    driver.apply_diff("layer", "", DATA)
    for outcome in killed_at_every_step(work):
        assert len(pushed(settings)) + pending_count(settings) >= len(CONTENTS), (
            "each object is in the remote or pending"
        )
        if not outcome.was_killed:
            break
        push(settings)
        assert pushed(settings) == WANTED
        assert pending_count(settings) == 0
        empty_remote(settings)
        driver.remove("layer")
        Engine.of(settings).collect_garbage()
        driver.create("layer")
        driver.apply_diff("layer", "", DATA)
    assert pushed(settings) == WANTED


def test_an_import_killed_at_any_step_and_repeated_is_pushed_completely(settings: Settings) -> None:
    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.create("layer", "")
        driver.apply_diff("layer", "", io.BytesIO(DATA))

    for outcome in killed_at_every_step(work):
        driver = InProcess(settings)
        if outcome.was_killed:
            driver.remove("layer")
            driver.create("layer")
            driver.apply_diff("layer", "", DATA)
        Engine.of(settings).push_pending()
        assert pushed(settings) == WANTED
        driver.remove("layer")
        Engine.of(settings).collect_garbage()
        empty_remote(settings)


def test_an_import_killed_at_any_step_leaves_no_permanent_queue_entry(settings: Settings) -> None:
    def work(report: Report) -> None:
        driver = GearDriver(settings)
        driver.create("layer", "")
        driver.apply_diff("layer", "", io.BytesIO(DATA))

    announced_only = 0
    for _ in killed_at_every_step(work):
        driver = InProcess(settings)
        driver.remove("layer")
        before = pending_count(settings)
        Engine.of(settings).collect_garbage()
        announced_only += before - pending_count(settings)
        Engine.of(settings).push_pending()
        assert pending_count(settings) == 0
        empty_remote(settings)
    assert announced_only


@pytest.fixture
def announced(settings: Settings) -> tuple[PushQueue, ObjectStore, bytes]:
    """Return a push queue in which an object is announced but not stored."""
    store = ObjectStore(settings.gear_public_cache_path)
    push_queue = PushQueue(settings.gear_push_path, store)
    digest = hashlib.sha256(CONTENTS[0]).digest()
    push_queue.announce(digest)
    return push_queue, store, digest


def stored(store: ObjectStore, digest: bytes, settings: Settings) -> None:
    fd = os.open(settings.gear_build_path, os.O_RDONLY)
    assert store.put(digest, memoryview(CONTENTS[0]), fd)
    os.close(fd)


Announced = tuple[PushQueue, ObjectStore, bytes]


def test_announcements_of_a_running_import_are_kept(settings: Settings, announced: Announced) -> None:
    push_queue, _, digest = announced
    build = settings.gear_build_path / "layer.1"
    build.mkdir()
    claims = RefWriter(build)
    claims.add(digest, len(CONTENTS[0]))
    Engine.of(settings).collect_garbage()
    assert list(push_queue.pending()) == [digest]
    claims.close()
    shutil.rmtree(build)
    Engine.of(settings).collect_garbage()
    assert pending_count(settings) == 0


@pytest.mark.parametrize("announces", [True, False])
def test_an_object_stored_while_its_announcement_is_removed_is_pushed(
    settings: Settings, announced: Announced, announces: bool
) -> None:
    push_queue, store, digest = announced

    def importing() -> set[bytes]:
        """Store the object while the collector reads the refs, with an announcement now or before."""
        if announces:
            push_queue.announce(digest)
        stored(store, digest, settings)
        push_queue.add(digest)
        return set()

    assert push_queue.remove_unstored(importing) == 0
    Engine.of(settings).collect_garbage()
    assert pending_count(settings) == 1
    assert Engine.of(settings).push_pending().pushed_objects == 1
    assert pushed(settings) == {digest.hex()}


def test_an_object_whose_link_was_set_aside_is_pushed(settings: Settings, announced: Announced) -> None:
    """The import replaced the announcement by a link, the collector renamed the link and was killed."""
    push_queue, store, digest = announced
    stored(store, digest, settings)
    push_queue.add(digest)
    path = settings.gear_push_path / digest.hex()
    path.rename(f"{path}.aside")
    push_queue.announce(digest)
    assert push_queue.remove_unstored(set) == 0
    assert path.stat().st_size == len(CONTENTS[0]) and pending_count(settings) == 1


def test_a_removal_of_announcements_killed_at_any_step_is_finished_by_the_next(
    settings: Settings, announced: Announced
) -> None:
    push_queue, _, digest = announced

    def work(report: Report) -> None:
        push_queue.remove_unstored(lambda: {digest})

    for _ in killed_at_every_step(work):
        assert pending_count(settings) in (1, 2)
        assert push_queue.remove_unstored(lambda: {digest}) == 0
        assert list(push_queue.pending()) == [digest]
    assert push_queue.remove_unstored(set) == 1 and pending_count(settings) == 0


def test_pending_objects_outlive_their_layer_and_the_collector(settings: Settings) -> None:
    driver = InProcess(settings)
    driver.remove(apply_layer(driver, file("a", CONTENTS[0])))
    Engine.of(settings).collect_garbage()
    assert Engine.of(settings).push_pending().pushed_objects == 1
    assert pushed(settings) == {hashlib.sha256(CONTENTS[0]).hexdigest()}


def test_a_remote_receives_all_objects_after_an_outage(settings: Settings) -> None:
    remote, moved = Path(settings.remote.url), Path(settings.remote.url + "-moved")
    driver = InProcess(settings)
    driver.create("layer")
    remote.rename(moved)
    remote.write_text("no directory")
    driver.apply_diff("layer", "", DATA)
    with pytest.raises(GearError, match="remote"):
        Engine.of(settings).push_pending()
    assert pending_count(settings) == len(CONTENTS)
    remote.unlink()
    moved.rename(remote)
    assert InProcess(settings).exists("layer")
    Engine.of(settings).push_pending()
    assert pushed(settings) == WANTED
    assert pending_count(settings) == 0


def test_a_damaged_object_is_not_pushed_and_does_not_block_others(settings: Settings) -> None:
    driver = InProcess(settings)
    apply_layer(driver, *(file(f"f{number}", content) for number, content in enumerate(CONTENTS)))
    damaged = {damage(settings, content) for content in (CONTENTS[0], CONTENTS[2])}
    report = Engine.of(settings).push_pending()
    assert set(report.refused) == damaged
    assert pushed(settings) == {hashlib.sha256(CONTENTS[1]).hexdigest()}
    assert {path.name for path in settings.gear_push_path.iterdir()} == {digest.hex() for digest in damaged}
    assert list((Path(settings.remote.url) / "staging").iterdir()) == [], "there is no temporary file"


class Refusing(DirectoryStore):
    """A remote that rejects some blobs as wrong."""

    refused: frozenset[bytes] = frozenset()

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        if any(digest in self.refused for digest, _ in blobs):
            raise IntegrityError("not what it says")
        super().put_many(blobs)


def test_an_object_that_the_remote_rejects_does_not_block_later_ones(settings: Settings) -> None:
    contents = [bytes([number]) * 900_000 for number in range(10)]
    apply_layer(InProcess(settings), *(file(f"f{number}", content) for number, content in enumerate(contents)))
    push_queue = PushQueue(settings.gear_push_path, ObjectStore(settings.gear_public_cache_path))
    first = next(push_queue.pending())
    store = Refusing(Path(settings.remote.url))
    store.refused = frozenset([first])
    assert push_pending(push_queue, Remote(store)) == PushReport(len(contents) - 1, {first: "not what it says"})
    assert list(push_queue.pending()) == [first]


def test_a_repaired_object_is_pushed_when_it_is_stored_again(settings: Settings) -> None:
    driver = InProcess(settings)
    layers = [apply_layer(driver, file(f"f{number}", content)) for number, content in enumerate(CONTENTS[:2])]
    for content in CONTENTS[:2]:
        damage(settings, content)
    driver.remove(layers[1])
    Engine.of(settings).collect_garbage()
    faults = list(Engine.of(settings).faults(read_data=True, repair=True))
    assert sum("removed" in fault for fault in faults) == 2, "the push queue holds objects of removed layers"
    assert pending_count(settings) == 0
    apply_layer(driver, file("again", CONTENTS[0]))
    assert Engine.of(settings).push_pending() == PushReport(1, {})


def test_the_command_lists_objects_that_could_not_be_pushed(settings: Settings) -> None:
    driver = InProcess(settings)
    apply_layer(driver, *(file(f"f{number}", content) for number, content in enumerate(CONTENTS[:2])))
    digest = damage(settings, CONTENTS[0])
    command = [sys.executable, "-c", "from gearworkers.cli.main import main; main()", "push"]
    environ = {**os.environ, "GEAR_ROOT": str(settings.gear_root), "GEAR_REMOTE": settings.remote.url}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert digest.hex() in done.stdout
    assert "pushed 1 objects, 1 could not be pushed" in done.stdout


def damage(settings: Settings, content: bytes) -> bytes:
    """Change a byte of an object; return its digest."""
    digest = hashlib.sha256(content).digest()
    path = Path(os.fsdecode(ObjectStore(settings.gear_public_cache_path).path(digest)))
    path.write_bytes(content[:-1] + b"!")
    return digest


def test_foreign_files_in_the_push_directory_do_not_block_pushes(settings: Settings) -> None:
    apply_layer(InProcess(settings), file("new", CONTENTS[0]))
    (settings.gear_push_path / "lost+found").mkdir()
    (settings.gear_push_path / ".nfs000000000001").touch()
    assert Engine.of(settings).push_pending() == PushReport(1, {})


if __name__ == "__main__":
    push_killed_at_every_step(settings_in(Path(sys.argv[1])))
