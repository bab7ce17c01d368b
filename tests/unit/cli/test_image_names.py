"""Names of images and containers: which daemon is asked, and the errors if none has what is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gearworkers.cli.docker_api import Dockerd
from gearworkers.cli.image_names import find_container, find_image, in_namespace, plain_name
from gearworkers.cli.local_images import LocalImage
from gearworkers.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from gearworkers.settings import Settings
from tests.support.fake_dockerd import fake_dockerd

ID = f"sha256:{'ab' * 32}"
SNAPSHOTTER = [["driver-type", "io.containerd.snapshotter.v1"]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A node on which no daemon answers."""
    return Settings(
        gear_root=tmp_path / "gear",
        run_dir=tmp_path / "run",
        docker_host=f"unix://{tmp_path}/docker.sock",
        containerd_address=tmp_path / "containerd.sock",
    )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def dockerd(stack: ExitStack, settings: Settings, answers: Mapping[str, Any]) -> None:
    stack.enter_context(fake_dockerd(Path(settings.docker_host.removeprefix("unix://")), answers))


def in_layer(path: Path, **more: Any) -> dict[str, Any]:
    """dockerd's description of an image or a container whose layer is the directory *path*."""
    return {"Id": ID, "GraphDriver": {"Name": "gear", "Data": {"UpperDir": f"{path}/upper"}}, **more}


@pytest.mark.parametrize("name", ["app:1", "docker:app:1"])
def test_an_image_of_the_driver_is_found_by_its_directory(settings: Settings, stack: ExitStack, name: str) -> None:
    labels = {"Labels": {"io.gearworkers.image": "1"}}
    dockerd(stack, settings, {"/images/app:1/json": in_layer(settings.gear_images_path / "abc", Config=labels)})
    assert find_image(settings, name) == LocalImage(ID, is_gear=True, top_layer="abc")


def test_a_container_of_the_driver_is_found_by_its_directory(settings: Settings, stack: ExitStack) -> None:
    dockerd(stack, settings, {"/containers/web/json": in_layer(settings.gear_containers_path / "abc", Config=None)})
    assert find_container(settings, "web") == "abc"


def test_running_containers_are_listed_by_layer(settings: Settings, stack: ExitStack) -> None:
    answers = {
        "/containers/json": [{"Id": "1" * 64, "Names": ["/web"]}, {"Id": "2" * 64, "Names": None}],
        f"/containers/{'1' * 64}/json": in_layer(settings.gear_containers_path / "one"),
        f"/containers/{'2' * 64}/json": in_layer(settings.gear_containers_path / "two"),
    }
    dockerd(stack, settings, answers)
    assert Dockerd(settings).container_names() == {"one": "web", "two": "2" * 12}


def test_an_image_without_layers_has_no_top_layer(settings: Settings, stack: ExitStack) -> None:
    answers = {
        "/images/empty/json": {"Id": ID, "GraphDriver": {"Name": "gear", "Data": None}, "RootFS": {"Layers": None}},
        "/info": {"Driver": "gear", "DriverStatus": None},
    }
    dockerd(stack, settings, answers)
    assert find_image(settings, "empty").top_layer == ""


def test_an_image_of_another_driver_or_snapshotter_is_refused(settings: Settings, stack: ExitStack) -> None:
    answers = {
        "/images/elsewhere/json": in_layer(Path("/var/lib/docker/overlay2/abc")),
        "/images/other/json": {"Id": ID, "GraphDriver": None, "RootFS": {"Type": "layers", "Layers": [ID]}},
        "/info": {"Driver": "overlayfs", "DriverStatus": SNAPSHOTTER},
    }
    dockerd(stack, settings, answers)
    with pytest.raises(FailedPrecondition, match="not in GEAR_ROOT="):
        find_image(settings, "elsewhere")
    with pytest.raises(FailedPrecondition, match="dockerd's snapshotter overlayfs, not by gear"):
        find_image(settings, "other")


def test_an_image_of_containerds_store_needs_the_gateway(settings: Settings, stack: ExitStack) -> None:
    answers = {
        "/images/app/json": {"Id": ID, "GraphDriver": {"Name": "gear"}, "RootFS": {"Layers": [ID]}},
        "/info": {"Driver": "gear", "DriverStatus": SNAPSHOTTER},
    }
    dockerd(stack, settings, answers)
    with pytest.raises(FailedPrecondition, match="namespace moby, but the gateway does not answer at"):
        find_image(settings, "docker:app")


def test_the_error_names_what_was_asked_and_whom(settings: Settings, stack: ExitStack) -> None:
    with pytest.raises(Unavailable) as silent:
        find_image(settings, "app:1")
    assert str(silent.value).startswith(f"app:1 is not on this node: no dockerd answers at {settings.docker_host}")
    assert str(silent.value).endswith(f"no containerd answers at {settings.containerd_address}")
    dockerd(stack, settings, {})
    with pytest.raises(NotFound) as missing:
        find_image(settings, "app:1")
    assert f"dockerd at {settings.docker_host} does not have it; no containerd" in str(missing.value)
    with pytest.raises(Unavailable, match=r"^app:1 is not on this node: no containerd answers"):
        find_image(settings, "containerd:app:1")
    with pytest.raises(NotFound, match=r"the image docker:24 of Docker Hub is docker.io/library/docker:24"):
        find_image(settings, "docker:24")
    with pytest.raises(NotFound, match=r"does not have it$"):
        find_image(settings, "docker:registry/app:24")


def test_containerd_is_not_asked_where_it_is_not_served(settings: Settings) -> None:
    with pytest.raises(Unavailable) as caught:
        find_image(replace(settings, containerd_socket="off"), "app:1")
    assert "no containerd answers" not in str(caught.value)


def test_the_option_namespace_asks_containerd_alone(settings: Settings) -> None:
    assert in_namespace(settings, "app:1", "") == (settings, "app:1")
    for name in ("app:1", "containerd:app:1"):
        found, full = in_namespace(settings, name, "k8s.io")
        assert (found.containerd_namespace, full) == ("k8s.io", "containerd:app:1")
    with pytest.raises(InvalidInput, match="containerd only"):
        in_namespace(settings, "docker:app:1", "k8s.io")


@pytest.mark.parametrize("name", ["app:1", "docker:app:1", "containerd:app:1"])
def test_a_plain_name_has_no_daemon(name: str) -> None:
    assert plain_name(name) == "app:1"
