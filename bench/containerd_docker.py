"""Docker on containerd's image store, with gearworkers' snapshotter and with overlayfs."""

from __future__ import annotations

from pathlib import Path

from bench.containerd_sides import ContainerdSide, containerd_sides
from bench.frame import Figure, Pairs, fresh_disk, seconds
from bench.large_image import write_image
from tests.support import rootfs
from tests.support.registry import Registry
from tests.support.tiny import tiny_tar

TURNS = 3
RUNS = 21
STEPS = 10
IMAGES = 5


def containerd_docker() -> list[Figure]:
    """Measure pull, load, commit, diff, build and run of an image of 1.5 GB, and bytes on disk."""
    pulls, loads, alone, shared = Pairs(), Pairs(), Pairs(), Pairs()
    commits, diffs, builds, runs = Pairs(), Pairs(), Pairs(), Pairs()
    with fresh_disk() as disk:
        registry = Registry(disk / "registry")
        registry.start()
        name, archive = f"{registry.host}/large:1", disk / "image.tar"
        write_image(archive, name, base=tiny_tar())
        _push(disk, archive, name)
        for turn in range(TURNS):
            with containerd_sides(disk, turn, docker=True) as sides:
                for side in sides:
                    pulls.add_value(side.is_ours, seconds(side.docker.docker, "pull", name))
            with containerd_sides(disk, TURNS + turn, docker=True) as sides:
                for side in sides:
                    loads.add_value(side.is_ours, seconds(side.docker.docker, "load", "-i", str(archive)))
                    alone.add_value(side.is_ours, side.stored_bytes())
                for side in sides:
                    _change(side, name, turn, commits, diffs, builds)
                for _ in range(RUNS // TURNS):
                    for side in sides:
                        runs.add_value(side.is_ours, seconds(side.docker.run, name, "true"))
        registry.stop()
        with containerd_sides(disk, 2 * TURNS, docker=True) as sides:
            for side in sides:
                shared.add_value(side.is_ours, _five_images(side))
    return [
        pulls.figure("docker pull of 1.5 GB in 6 layers from a local registry, s", 0.50),
        loads.figure("docker load of the same image, s", 0.60),
        commits.figure("docker commit of a small change to it, s", 0.10),
        diffs.figure("docker diff of that container, s", 1.00),
        builds.figure("BuildKit, 10 small steps on it, s", 1.00),
        runs.figure("docker run --rm of true, s", 1.05),
        alone.figure("disk used by the image, without the content store, bytes", 1.02),
        shared.figure("disk used by 5 images that share a base, without the content store, bytes", 0.35),
    ]


def _push(disk: Path, archive: Path, name: str) -> None:
    with containerd_sides(disk, 99, docker=True) as (side, _):
        side.docker.docker("load", "-i", str(archive))
        side.docker.docker("push", name)


def _change(side: ContainerdSide, name: str, turn: int, commits: Pairs, diffs: Pairs, builds: Pairs) -> None:
    """Measure diff and commit of a container with a small change, and a build of ten steps."""
    docker = side.docker
    docker.run(name, "sh", "-c", "echo changed > /tree/new; rm -f /bin/wc", options=("--name", "changed"))
    diffs.add_value(side.is_ours, seconds(docker.docker, "diff", "changed"))
    commits.add_value(side.is_ours, seconds(docker.docker, "commit", "changed", "committed"))
    steps = [f"FROM {name}", *(f"RUN echo {turn} {step} > /step{step}" for step in range(STEPS))]
    options = ("build", "--network", "host", "-t", "built", "-")
    builds.add_value(side.is_ours, seconds(docker.docker, *options, stdin="\n".join(steps).encode()))


def _five_images(side: ContainerdSide) -> float:
    """Build five images that each install the same dependencies; return their bytes on disk."""
    side.docker.docker("import", str(rootfs.debian()), "debian")
    for number in range(IMAGES):
        text = f"FROM debian\nRUN mkdir /app{number} && cp -a /usr/lib /app{number}/lib\nRUN echo {number} > /number\n"
        options = ("build", "--network", "host", "-t", f"image{number}", "-")
        side.docker.docker(*options, stdin=text.encode())
    side.docker.docker("builder", "prune", "-af")
    return side.stored_bytes()
