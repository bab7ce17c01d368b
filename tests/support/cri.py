"""A client of Kubernetes' Container Runtime Interface, as a kubelet is one. Its pods use the host's network.

Source: k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from tests.support import sandbox
from tests.support.containerd import Refused, channel_to, unary
from tests.support.cri_api import cri_pb2 as pb

_HANDLER = "io.containerd.cri.runtime-handler"
"""The annotation by which containerd finds the snapshotter of a pull."""
_M = TypeVar("_M", bound=Message)
_numbers = itertools.count(1)


class Cri:
    """The calls of both services; each raises Refused if containerd returns an error.

    Args:
        channel: To containerd's socket.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._pods: dict[str, pb.PodSandboxConfig] = {}

    def is_ready(self) -> bool:
        """Whether containerd has restored its pods and answers."""
        try:
            self.images()
        except Refused as exc:
            if exc.code is not grpc.StatusCode.UNKNOWN and exc.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    def remove_everything(self) -> None:
        """Remove all pods of this client, and all images."""
        for pod in list(self._pods):
            self.remove_pod(pod)
        for image in self.images():
            self.remove_image(image)

    # -- images

    def pull(self, image: str, pod: pb.PodSandboxConfig | None = None) -> str:
        """Pull an image, for a pod of `pod_config` if one is given; return the image's id."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image), sandbox_config=pod)
        return self._image("PullImage", request, pb.PullImageResponse).image_ref

    def images(self) -> set[str]:
        """Return the tags of all images."""
        found = self._image("ListImages", pb.ListImagesRequest(), pb.ListImagesResponse).images
        return {tag for image in found for tag in image.repo_tags}

    def remove_image(self, image: str) -> None:
        """Remove an image; containerd collects its garbage before it answers."""
        self._image("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=image)), pb.Empty)

    def image_file_systems(self) -> list[pb.FilesystemUsage]:
        """Return the use of the snapshotters' file systems, that of the default snapshotter first."""
        response = self._image("ImageFsInfo", pb.ImageFsInfoRequest(), pb.ImageFsInfoResponse)
        return list(response.image_filesystems)

    # -- pods

    def run_pod(self, pod: pb.PodSandboxConfig, runtime: str = "") -> str:
        """Run a pod of `pod_config`; return its id.

        Args:
            pod: The pod's configuration.
            runtime: The handler that the pod's RuntimeClass names; empty for the default.
        """
        request = pb.RunPodSandboxRequest(config=pod, runtime_handler=runtime)
        id = self._runtime("RunPodSandbox", request, pb.RunPodSandboxResponse).pod_sandbox_id
        self._pods[id] = pod
        return id

    def remove_pod(self, id: str) -> None:
        """Stop and remove a pod with its containers."""
        self._runtime("StopPodSandbox", pb.PodSandboxRequest(pod_sandbox_id=id), pb.Empty)
        self._runtime("RemovePodSandbox", pb.PodSandboxRequest(pod_sandbox_id=id), pb.Empty)
        del self._pods[id]

    # -- containers

    def run(self, pod: str, image: str, *command: str) -> str:
        """Create and start a container in a pod; return its id."""
        id = self.create(pod, image, *command)
        self._runtime("StartContainer", pb.ContainerRequest(container_id=id), pb.Empty)
        return id

    def create(self, pod: str, image: str, *command: str) -> str:
        """Create a container in a pod; return its id."""
        security = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE))
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=f"container-{next(_numbers)}"),
            image=pb.ImageSpec(image=image),
            command=command,
            linux=pb.LinuxContainerConfig(security_context=security),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self._pods[pod])
        return self._runtime("CreateContainer", request, pb.CreateContainerResponse).container_id

    def exec(self, container: str, *command: str) -> str:
        """Run a command in a container; return its stdout, stripped.

        Raises:
            AssertionError: The command failed.
        """
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=60)
        done = self._runtime("ExecSync", request, pb.ExecSyncResponse)
        assert done.exit_code == 0, f"{command}: {done.exit_code}: {done.stderr.decode(errors='replace')}"
        return done.stdout.decode(errors="replace").strip()

    def writable_layer(self, container: str) -> pb.FilesystemUsage:
        """Return the use of a container's own layer, from ContainerStats; empty until containerd has measured it."""
        request = pb.ContainerRequest(container_id=container)
        return self._runtime("ContainerStats", request, pb.ContainerStatsResponse).stats.writable_layer

    def _image(self, method: str, request: Message, response: type[_M]) -> _M:
        return unary(self._channel, f"/runtime.v1.ImageService/{method}", request, response)

    def _runtime(self, method: str, request: Message, response: type[_M]) -> _M:
        return unary(self._channel, f"/runtime.v1.RuntimeService/{method}", request, response)


@contextmanager
def cri(socket: Path) -> Iterator[Cri]:
    """Yield a client of containerd's *socket*. Its calls wait until containerd listens."""
    with channel_to(socket) as channel:
        yield Cri(channel)


def pod_config(name: str, runtime: str = "") -> pb.PodSandboxConfig:
    """Return the configuration of a pod.

    Args:
        name: The pod's name; one of a name may exist.
        runtime: The handler whose snapshotter a pull for the pod uses; empty for the default snapshotter.
    """
    annotations: Mapping[str, str] = {_HANDLER: runtime} if runtime else {}
    security = pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE))
    return pb.PodSandboxConfig(
        metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="tests"),
        annotations=annotations,
        linux=pb.LinuxPodSandboxConfig(cgroup_parent=sandbox.cgroup_parent(), security_context=security),
    )
