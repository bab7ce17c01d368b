"""Generate the messages of containerd's API and of Kubernetes' CRI from their .proto files: `make protos`.

The generated modules are checked in, so that an installation needs no compiler; a test compares them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = (Path("gearworkers/containerd/api"), Path("tests/support/cri_api"))
"""Directories of .proto files; their modules are written beside them."""


def generate(target: Path) -> None:
    """Write the ``*_pb2.py`` and ``*_pb2.pyi`` below the directory *target*.

    Raises:
        RuntimeError: A .proto file is wrong; the compiler has printed the reason.
    """
    files = (path for package in PACKAGES for path in (CHECKOUT / package).glob("*.proto"))
    sources = sorted(str(path.relative_to(CHECKOUT)) for path in files)
    well_known = Path(protoc.__file__).parent / "_proto"
    options = [f"--proto_path={CHECKOUT}", f"--proto_path={well_known}"]
    if protoc.main(["protoc", *options, f"--python_out={target}", f"--pyi_out={target}", *sources]) != 0:
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(CHECKOUT)
    sys.exit()
