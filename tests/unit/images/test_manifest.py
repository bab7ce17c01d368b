"""Manifests and configs of images."""

from __future__ import annotations

import hashlib

from gearworkers.images.manifest import chain_id


def sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_a_chain_id_covers_all_layers_in_order() -> None:
    one, two, three = sha256("one"), sha256("two"), sha256("three")
    assert chain_id(()) == ""
    assert chain_id((one,)) == one
    assert chain_id((one, two, three)) == sha256(f"{sha256(f'{one} {two}')} {three}")
