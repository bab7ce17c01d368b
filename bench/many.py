"""Objects from `gear manager`: many small ones over a slow network, one large one over a fast one."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.frame import Figure, fresh_disk, seconds
from gearworkers.cas.store import ObjectStore
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.prefetch import Prefetcher
from gearworkers.fetch.priority_pool import PriorityPool
from gearworkers.remote.factory import open_remote
from gearworkers.remote.remote import Remote
from gearworkers.settings import RemoteSettings, Settings
from tests.support import rootfs
from tests.support.delay import delayed
from tests.support.processes import wait_until
from tests.support.registry import Registry
from tests.support.remotes import manager_server

OBJECTS = 1_000
SMALL_BYTES = range(4 << 10, (16 << 10) + 1)
ONE_WAY_S = 0.020
"""Each way, so a round trip takes 40 ms: the stricter reading of "20 ms"."""
LARGE_BYTES = 512 << 20
TURNS = 5
_REPOSITORY = "bench"


def many() -> list[Figure]:
    """Measure the prefetch of 1,000 files, and push and pull of one large object, against a registry."""
    with fresh_disk() as disk:
        registry = Registry(disk / "registry")
        registry.start()
        try:
            with manager_server(disk / "manager") as manager:
                return [*_small(disk, manager.url, registry), *_large(disk, manager.url, registry)]
        finally:
            registry.stop()


# -- many small objects


def _small(disk: Path, url: str, registry: Registry) -> list[Figure]:
    contents = _files_of_debian()
    remote = _remote(disk, url)
    remote.put_many(contents.items())
    for digest, content in contents.items():
        _upload(registry, digest, content)
    ours: dict[float, list[float]] = {ONE_WAY_S: [], ONE_WAY_S / 2: []}
    peer: list[float] = []
    for _ in range(TURNS):
        for one_way_s, taken_s in ours.items():
            taken_s.append(_over(url, one_way_s, lambda slow: _prefetch(disk / "node", slow, contents)))
        peer.append(_over(f"http://{registry.host}", ONE_WAY_S, lambda slow: _curl_all(disk / "curl", slow, contents)))
    work = f"{OBJECTS:,} small objects prefetched,"
    median_s = statistics.median(ours[ONE_WAY_S])
    return [
        Figure(f"{work} 20 ms each way, s", median_s, None, 1.0),
        Figure(f"{work} 20 ms a round trip, s", statistics.median(ours[ONE_WAY_S / 2]), None, 1.0),
        Figure(
            f"{work} 20 ms each way, against 32 requests at once to a registry, s",
            median_s,
            statistics.median(peer),
            None,
        ),
    ]


def _files_of_debian() -> Mapping[bytes, bytes]:
    """Return the first OBJECTS distinct files of SMALL_BYTES in the root file system, by digest."""
    found: dict[bytes, bytes] = {}
    with tarfile.open(rootfs.debian()) as tar:
        for entry in tar:
            if entry.isreg() and entry.size in SMALL_BYTES:
                file = tar.extractfile(entry)
                assert file is not None
                content = file.read()
                found[hashlib.sha256(content).digest()] = content
            if len(found) == OBJECTS:
                return found
    raise AssertionError(f"the root file system has only {len(found)} files of this size")


def _over(url: str, one_way_s: float, work: Callable[[str], float]) -> float:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with delayed(host, int(port), delay_s=one_way_s) as (slow_host, slow_port):
        return work(f"http://{slow_host}:{slow_port}")


def _prefetch(node: Path, url: str, contents: Mapping[bytes, bytes]) -> float:
    """Prefetch all objects into an empty store over new connections; return the seconds until all are verified."""
    settings = replace(Settings(), gear_root=_fresh(node), remote=RemoteSettings(url=url))
    store = ObjectStore(settings.gear_public_cache_path)
    store.prepare()
    pool = PriorityPool(settings.remote.fetch_threads, for_background=settings.remote.fetch_threads // 2)
    remote = open_remote(settings)
    large_bytes = settings.large_object_bytes
    fetcher = Fetcher(store, settings.gear_fetching_path, [remote], pool, large_bytes=large_bytes)
    fetcher.prepare()
    os.sync()
    began_s = time.perf_counter()
    prefetcher = Prefetcher(fetcher, [remote], pool, large_bytes=large_bytes)
    prefetcher.fetch_all((digest, len(content)) for digest, content in contents.items())
    wait_until(lambda: fetcher.stats.objects == len(contents), "all objects are in the store")
    taken_s = time.perf_counter() - began_s
    assert not fetcher.stats.failures and not fetcher.stats.corrupt
    pool.close()
    fetcher.close()
    remote.close()
    return taken_s


def _curl_all(directory: Path, url: str, contents: Mapping[bytes, bytes]) -> float:
    """Fetch all objects into files with curl; return the seconds."""
    config = _fresh(directory) / "config"
    lines = [f"url={url}{_blob(digest)}\noutput={directory}/{digest.hex()}" for digest in contents]
    config.write_text("\n".join(lines))
    command = ["curl", "-sS", "--no-progress-meter", "--fail", "--parallel", "--parallel-max", "32", "-K", str(config)]
    return seconds(subprocess.run, command, check=True)


# -- one large object


def _large(disk: Path, url: str, registry: Registry) -> list[Figure]:
    pushes: tuple[list[float], list[float]] = [], []
    pulls: tuple[list[float], list[float]] = [], []
    for turn in range(3):
        path = disk / "large"
        digest = _write_half_random(path, turn)
        remote = _remote(disk, url)
        pushes[0].append(seconds(_push, remote, path, digest))
        pushes[1].append(seconds(_curl_push, registry, path, digest))
        pulls[0].append(seconds(_pull, remote, digest, disk / "pulled"))
        pulls[1].append(seconds(_curl, f"http://{registry.host}{_blob(digest)}", "-o", str(disk / "pulled")))
    return [_per_gb("push of one large object, s per GB", *pushes), _per_gb("pull of it, s per GB", *pulls)]


def _per_gb(work: str, ours: Sequence[float], peer: Sequence[float]) -> Figure:
    median_s, median_peer_s = (statistics.median(taken_s) * 1e9 / LARGE_BYTES for taken_s in (ours, peer))
    return Figure(work, median_s, median_peer_s, None)


def _write_half_random(path: Path, seed: int) -> bytes:
    """Write a file that compresses to half its size, as programs do; return its digest."""
    source = random.Random(seed)
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(LARGE_BYTES >> 20):
            piece = b"".join(source.randbytes(2 << 10).ljust(4 << 10, b"x") for _ in range(256))
            hasher.update(piece)
            file.write(piece)
    return hasher.digest()


def _push(remote: Remote, path: Path, digest: bytes) -> None:
    with path.open("rb") as file:
        remote.put(digest, file.fileno())


def _pull(remote: Remote, digest: bytes, path: Path) -> None:
    with path.open("wb") as file:
        for piece in remote.fetch(digest):
            file.write(piece)


def _curl_push(registry: Registry, path: Path, digest: bytes) -> None:
    _curl("-X", "PUT", "-H", "Content-Type: application/octet-stream", "-T", str(path), _upload_url(registry, digest))


# -- a registry


def _upload(registry: Registry, digest: bytes, content: bytes) -> None:
    target = _upload_url(registry, digest).partition(registry.host)[2]
    connection = http.client.HTTPConnection(registry.host)
    connection.request("PUT", target, content, {"Content-Type": "application/octet-stream"})
    assert connection.getresponse().status == 201
    connection.close()


def _upload_url(registry: Registry, digest: bytes) -> str:
    connection = http.client.HTTPConnection(registry.host)
    connection.request("POST", f"/v2/{_REPOSITORY}/blobs/uploads/")
    response = connection.getresponse()
    response.read()
    connection.close()
    return f"{response.headers['Location']}&digest=sha256:{digest.hex()}"


def _blob(digest: bytes) -> str:
    return f"/v2/{_REPOSITORY}/blobs/sha256:{digest.hex()}"


def _curl(*arguments: str) -> None:
    subprocess.run(["curl", "-sS", "--fail", *arguments], check=True, stdout=subprocess.DEVNULL)


def _remote(disk: Path, url: str) -> Remote:
    return open_remote(replace(Settings(), gear_root=disk / "gear", remote=RemoteSettings(url=url)))


def _fresh(directory: Path) -> Path:
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    directory.mkdir(parents=True)
    return directory
