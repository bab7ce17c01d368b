"""Snapshots through containerd: the light calls, and `ctr run`."""

from __future__ import annotations

import statistics
import time
from typing import TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from bench.containerd_sides import ContainerdSide, containerd_sides
from bench.frame import Figure, Pairs, fresh_disk, seconds
from gearworkers.containerd.api import snapshots_pb2
from tests.support.images import Image
from tests.support.tiny import tiny_tar

CALLS = 300
RUNS = 21
_NAME = "docker.io/library/tiny:1"
_SERVICE = "/containerd.services.snapshots.v1.Snapshots"
_NAMESPACE = (("containerd-namespace", "bench"),)
_MS = 1000.0

_M = TypeVar("_M", bound=Message)


def snapshot_calls() -> list[Figure]:
    """Measure Prepare, Mounts, Commit and Remove together, in ms, and `ctr run` of `true`."""
    calls, runs = Pairs(), Pairs()
    with fresh_disk() as disk, containerd_sides(disk) as sides:
        archive = disk / "tiny.tar"
        archive.write_bytes(Image([tiny_tar()]).saved(_NAME))
        for side in sides:
            side.containerd.ctr("images", "import", "--snapshotter", side.snapshotter, str(archive))
        for turn in range(CALLS):
            for side in sides if turn % 2 else reversed(sides):
                calls.add_value(side.is_ours, _cycle_ms(side, f"snapshot{turn}"))
        for turn in range(RUNS):
            for side in sides if turn % 2 else reversed(sides):
                work = ("run", "--rm", "--snapshotter", side.snapshotter, _NAME, f"run{turn}", "true")
                runs.add_value(side.is_ours, seconds(side.containerd.ctr, *work))
    return [
        Figure("Prepare, Mounts, Commit and Remove, ms", statistics.median(calls.ours), None, 5.0),
        Figure("the same calls of overlayfs, ms", statistics.median(calls.peer), None, None),
        runs.figure("ctr run --rm of true, s", 1.05),
    ]


def _cycle_ms(side: ContainerdSide, key: str) -> float:
    """Make, mount, commit and remove a snapshot; return the milliseconds that this took."""
    name, snapshotter = f"committed-{key}", side.snapshotter
    labels = {"containerd.io/gc.root": "bench"}
    prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, labels=labels)
    commit = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, key=key, name=name, labels=labels)
    with grpc.insecure_channel(f"unix:{side.containerd.socket}") as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        begin = time.perf_counter()
        _call(channel, "Prepare", prepare, snapshots_pb2.PrepareSnapshotResponse)
        mounts = snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key)
        _call(channel, "Mounts", mounts, snapshots_pb2.MountsResponse)
        _call(channel, "Commit", commit, Empty)
        _call(channel, "Remove", snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=name), Empty)
        return (time.perf_counter() - begin) * _MS


def _call(channel: grpc.Channel, method: str, request: Message, response: type[_M]) -> None:
    call = channel.unary_unary(
        f"{_SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=response.FromString,
    )
    call(request, metadata=_NAMESPACE)
