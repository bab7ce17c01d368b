"""The filters of List: operators, fields, quotes, and filters that are refused."""

from __future__ import annotations

import pytest

from gearworkers.errors import InvalidInput
from plugin_gateway.containerd.filters import matcher
from plugin_gateway.containerd.snapshot_table import Snapshot, SnapshotKind


def snapshot(
    name: str = "default/1/key", parent: str = "", kind: SnapshotKind = SnapshotKind.ACTIVE, **labels: str
) -> Snapshot:
    return Snapshot(1, name, parent, kind, labels, 0, 0, "snapshot-1", 0, 0)


LABELS = {
    "size": "10",
    "containerd.io/gc.root": "2026-01-01T00:00:00Z",
    "a.b": "dotted",
    "text": 'a "quoted" word, and more',
    "path": "/usr/bin",
    "set": "a|b",
}
LABELLED = snapshot("default/2/sha256:abc", "default/1/base", SnapshotKind.COMMITTED, **LABELS)


@pytest.mark.parametrize(
    "text",
    [
        "kind==committed",
        "kind!=active",
        "kind~=comm",
        "kind~=^committed$",
        "name==default/2/sha256:abc",
        'name=="default/2/sha256:abc"',
        "name~=^default/.*/sha256:[a-f]+$",
        "name~=|^default/.*|",
        "parent==default/1/base",
        'parent!=""',
        "parent",
        "labels.size",
        "labels.size==10",
        'labels."size"=="10"',
        '"labels"."size"==10',
        "labels.size!=11",
        "labels.size~=^[0-9]+$",
        "labels.missing!=10",
        "labels.missing~=^$",
        'labels."containerd.io/gc.root"',
        'labels."containerd.io/gc.root"~="^2026-.*Z$"',
        "labels.a.b==dotted",
        'labels."a.b"==dotted',
        r'labels.text=="a \"quoted\" word, and more"',
        r'labels.text=="a \u0022quoted\u0022 word, and more"',
        r"labels.text~=/quoted. word, and/",
        'labels.path=="/usr/bin"',
        r"labels.path~=|^/usr/\w+$|",
        r'labels.path~="^/usr/\\w+$"',
        "labels.set~=/^a.b$/",
        "kind==committed,labels.size==10",
        "labels.size,name~=sha256,kind!=view",
        "",
    ],
)
def test_a_filter_matches(text: str) -> None:
    assert matcher([text])(LABELLED)


@pytest.mark.parametrize(
    "text",
    [
        "kind==COMMITTED",
        "kind!=committed",
        "kind~=^comm$",
        "name==sha256:abc",
        'parent==""',
        "labels.missing",
        'labels.missing==""',
        "labels.missing==10",
        "labels.missing~=.",
        "labels",
        "labels.size!=10",
        "labels.size.more",
        "labels.containerd",
        "unknown",
        "unknown==10",
        "name.more",
        "kind==committed,labels.size==11",
        "labels.missing,kind==committed",
    ],
)
def test_a_filter_does_not_match(text: str) -> None:
    assert not matcher([text])(LABELLED)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(SnapshotKind.VIEW, "view"), (SnapshotKind.ACTIVE, "active"), (SnapshotKind.COMMITTED, "committed")],
)
def test_each_kind_has_its_name(kind: SnapshotKind, text: str) -> None:
    assert matcher([f"kind=={text}"])(snapshot(kind=kind))


def test_no_filter_matches_every_snapshot() -> None:
    assert matcher([])(snapshot()) and matcher([])(LABELLED)


def test_one_of_several_filters_must_match() -> None:
    matches = matcher(["kind==view", "labels.size==10"])
    assert matches(LABELLED)
    assert matches(snapshot(kind=SnapshotKind.VIEW))
    assert not matches(snapshot())


def test_an_empty_parent_is_compared_as_an_empty_text() -> None:
    assert matcher(['parent==""'])(snapshot())
    assert not matcher(['parent!=""'])(snapshot())


def test_a_value_in_quotes_is_no_pattern_for_equality() -> None:
    assert not matcher(['name==".*"'])(snapshot())
    assert matcher(['name==".*"'])(snapshot(name=".*"))


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "kind==active,",
        ",kind==active",
        "kind==active,,name",
        "kind=active",
        "kind=",
        "kind==",
        "kind!=",
        "kind~=",
        "kind=== ",
        "kind<active",
        "==active",
        ".",
        "labels.",
        "labels..size",
        ".labels",
        "1",
        "labels.-",
        'labels."open',
        'name=="open',
        'labels.""x',
        'name=="a"b',
        "name==a b",
        "name==a\nkind==b",
        r'name=="\q"',
        "name~=(",
        'name~="["',
        "name~=/open",
        "name~=|open",
        "name~=/a/b",
        "kind==active name==a",
    ],
)
def test_a_malformed_filter_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^filter "):
        matcher([text])


def test_a_malformed_filter_is_refused_beside_a_valid_one() -> None:
    with pytest.raises(InvalidInput, match="kind="):
        matcher(["kind==active", "kind="])
