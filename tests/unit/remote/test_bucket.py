"""Translate the errors of obstore."""

from __future__ import annotations

import pytest
from obstore import exceptions as foreign

from gearworkers.errors import GearError
from gearworkers.remote import bucket


def test_every_error_of_obstore_is_translated() -> None:
    kinds = [kind for kind in vars(foreign).values() if isinstance(kind, type) and issubclass(kind, foreign.BaseError)]
    assert len(kinds) > 8
    for kind in kinds:
        with pytest.raises(GearError), bucket.translated("get"):
            raise kind("message")
