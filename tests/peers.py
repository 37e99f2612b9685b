"""Modules that stand for what a peer imports and a CPU machine cannot have."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


def absent(monkeypatch: pytest.MonkeyPatch, name: str, **values: object) -> None:
    """An empty module ``name`` (with ``values``), where the real one cannot be imported."""
    try:
        importlib.import_module(name)
        return
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(values)
    monkeypatch.setitem(sys.modules, name, module)
