"""`gear`: what an administrator asks of a node."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gearworkers.cas.store import ObjectStore
from gearworkers.cli import doctor as checks
from gearworkers.cli import profiles
from gearworkers.engine.engine import Engine
from gearworkers.errors import GearError, InvalidInput, NotFound
from gearworkers.images.manifest import Platform
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import order_prefetch, read_status
from gearworkers.mounts.probe import Check
from gearworkers.settings import Settings
from gearworkers.util.log import command_settings

_EXIT_FAULTS = 1
_EXIT_ERROR = 2

app = typer.Typer(
    help="Look after a node's gearworkers store and its images. Paths come from the environment: GEAR_ROOT, "
    "GEAR_RUN_DIR, GEAR_PLUGIN_SOCKET, GEAR_BROKER_URL, GEAR_REMOTE.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(profiles.app, name="profile")
_out = Console(soft_wrap=True, highlight=False)


@app.command()
def doctor() -> None:
    """Check kernel, file system, Redis, workers and Docker: one line each; exit 1 if something needed is wrong."""
    found = checks.diagnose(command_settings())
    for check in found:
        _print_check(check)
    if any(check.needed and not check.ok for check in found):
        raise typer.Exit(_EXIT_FAULTS)


@app.command()
def status() -> None:
    """What the store holds, and how the gateway is."""
    settings = command_settings()
    told = checks.gateway_status(settings) or [*_engine(settings).status(), ("Gateway", "not running")]
    for key, value in (*told, *_lazy_status(settings), *_pinned(settings)):
        _out.print(f"{key + ':':<20} {value}", markup=False)


@app.command()
def gc() -> None:
    """Remove the objects that no layer refers to, now."""
    report = _engine(command_settings()).collect_garbage()
    _out.print(
        f"removed {report.removed_objects} objects, {report.removed_bytes} bytes; "
        f"kept {report.kept_objects} objects, {report.kept_bytes} bytes"
    )


@app.command()
def fsck(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Also read every byte and compare its SHA-256.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged objects; what is removed or missing is fetched again.")
    ] = False,
) -> None:
    """Check that every object is what its name says and every layer is whole; exit 1 on faults."""
    settings = command_settings()
    incomplete: set[str] = set()
    faults = 0
    for fault in _engine(settings).faults(read_data=read_data, repair=repair, incomplete=incomplete.add):
        faults += 1
        _out.print(fault, markup=False)
    if incomplete:
        coming = order_prefetch(settings.lazyfs_socket, sorted(incomplete))
        _out.print(f"{coming} objects are being fetched; `gear status` names those that cannot be had.")
        _out.print(
            "Containers that had opened a damaged one keep it: stop and start them (`docker restart` is not enough)."
        )
    _out.print(f"{faults} faults")
    if faults:
        raise typer.Exit(_EXIT_FAULTS)


@app.command()
def push() -> None:
    """Push what waits in the spool to GEAR_REMOTE, now; exit 1 if an object cannot be pushed."""
    report = _engine(command_settings()).push_pending()
    for digest, why in report.refused.items():
        _out.print(f"not pushed: object {digest.hex()}: {why}", markup=False)
    _out.print(f"pushed {report.pushed_objects} objects, {len(report.refused)} could not be pushed")
    if report.refused:
        raise typer.Exit(_EXIT_FAULTS)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="An image: [HOST/]NAME[:TAG][@DIGEST], oci:PATH[:TAG] or docker-archive:PATH[:TAG].")
    ],
    target: Annotated[str, typer.Argument(help="Name of the Gear image: [HOST/]NAME[:TAG]; not the source's.")],
    platform: Annotated[
        str,
        typer.Option(
            help="Platform to convert: OS/ARCHITECTURE[/VARIANT]. "
            "Default: this host's, and any of an image for one platform only."
        ),
    ] = "",
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Convert it for all platforms.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="By processes here instead of workers; paths are always converted here.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Convert also layers that were converted before.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="How many layers at once, here.")] = os.cpu_count() or 1,
) -> None:
    """Make a Gear image of an image: its contents go to GEAR_REMOTE, all else to TARGET's registry."""
    from gearworkers.cli.convert import convert_image  # of use to no other command

    if all_platforms and platform:
        raise InvalidInput("--platform or --all-platforms, not both")
    convert_image(
        command_settings(),
        source,
        target,
        Platform.parse(platform) if platform else None,
        all_platforms=all_platforms,
        again=again,
        processes=processes,
        local=local,
    )


@app.command()
def inspect(image: Annotated[str, typer.Argument(help="As Docker knows it; else as a registry does.")]) -> None:
    """Whether an image is a Gear image, and how much of it is here, pinned, missing."""
    from gearworkers.cli import images

    _print_pairs(images.inspect(command_settings(), image))


@app.command()
def pin(image: Annotated[str, typer.Argument(help="As Docker knows it.")]) -> None:
    """Fetch all of a pulled image in the background, and keep it here whatever happens, until `gear unpin`."""
    from gearworkers.cli import images

    _print_pairs(images.pin(command_settings(), image))


@app.command()
def unpin(image: Annotated[str, typer.Argument(help="As it was pinned, or its id.")]) -> None:
    """Keep an image's files only as long as its layers are here."""
    from gearworkers.cli import images

    _print_pairs(images.unpin(command_settings(), image))


@app.command()
def lazyfs() -> None:
    """Serve the files of images that have not arrived; runs until SIGTERM."""
    from gearworkers.lazyfs.server import open_sources, serve  # of use to no other command

    settings = command_settings()
    serve(settings, open_sources(settings))


@app.command()
def manager() -> None:
    """Keep objects for all nodes and serve them over HTTP (GEAR_MANAGER_LISTEN); runs until SIGTERM."""
    from gearworkers.manager.server import serve  # of use to no other command

    serve(command_settings())


def main() -> None:
    """Run `gear`; an error is one line on stderr and exit status 2."""
    with _errors_told():
        app()


def _engine(settings: Settings) -> Engine:
    """Return the engine of this host's store.

    Raises:
        NotFound: GEAR_ROOT holds no store.
    """
    if not settings.gear_public_cache_path.is_dir():
        raise NotFound(
            f"{settings.gear_root} holds no store; set GEAR_ROOT to the store's directory, or start the gateway"
        )
    return Engine.of(settings)


def _lazy_status(settings: Settings) -> Iterator[tuple[str, str]]:
    found = read_status(settings.lazyfs_socket)
    if found is None:
        yield "Lazy Files", "not served: `gear lazyfs` does not run"
        return
    yield "Lazy Files", f"{found.incomplete_layers} incomplete layers, {found.arriving} objects arriving"
    yield (
        "Fetched",
        f"{found.fetched_objects} objects, {found.received_bytes} bytes received, {found.reused_bytes} found in "
        f"other objects, {found.corrupt} corrupt",
    )
    yield (
        "Profiles",
        f"{found.profiles_found} found, {found.profiles_absent} absent; {found.prefetched} objects and chunks, "
        f"{found.prefetched_bytes} bytes prefetched; {found.on_demand} requests on demand",
    )
    for digest, why in found.failures.items():
        yield f"Failed {digest}", why


def _pinned(settings: Settings) -> Iterator[tuple[str, str]]:
    store = ObjectStore(settings.gear_public_cache_path)
    for pin in Pins(settings, LayerStore(settings, store), store).all():
        yield "Pinned", f"{pin.name} ({pin.image})"


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for key, value in pairs:
        _out.print(f"{key:<16}{value}", markup=False)


def _print_check(check: Check) -> None:
    mark = "[green]ok[/]" if check.ok else ("[red]WRONG[/]" if check.needed else "[yellow]note[/]")
    advice = f"; {check.advice}" if check.advice else ""
    _out.print(f"{mark:<14} {escape(f'{check.name}: {check.found}{advice}')}")


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except GearError as exc:
        sys.exit(_told(str(exc)))
    except OSError as exc:
        is_denied = isinstance(exc, PermissionError) and os.geteuid()
        sys.exit(_told(f"{exc}; `gear` needs root" if is_denied else str(exc)))


def _told(text: str) -> int:
    print(f"gear: {text}", file=sys.stderr)
    return _EXIT_ERROR
