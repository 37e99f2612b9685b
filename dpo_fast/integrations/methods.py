"""A method of somebody else's class, replaced for good or for a while, and put back as it was."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType
from typing import Any

from dpo_fast.integrations.interface import InterfaceChanged, check_parameters

_ORIGINAL = "_dpo_fast_original"  # on the replacement: the function that it replaced
_BACKEND = "_dpo_fast_backend"


@dataclass(frozen=True)
class MethodPatch:
    """``package``'s class ``module.class_name`` with another ``method``.

    Attributes:
        package: as ``pip`` calls it. module, class_name, method: where the method lives.
        parameters: those that the method must have, in this order.
        make: ``(original, backend) -> function`` that takes the same.
        remedy: what to install where the package is missing.
    """

    package: str
    module: str
    class_name: str
    method: str
    parameters: tuple[str, ...]
    make: Callable[[Any, str], Any]
    remedy: str

    @property
    def where(self) -> str:
        """The method's full name."""
        return f"{self.module}.{self.class_name}.{self.method}"

    def seen(self) -> str:
        """The package and its version, for messages."""
        return seen(self.package)

    def apply(self, backend: str) -> bool:
        """Replace the method; False if it was replaced already.

        Raises:
            ValueError: it is replaced with another backend. ImportError: the package is missing.
            InterfaceChanged: the method is not the known one; nothing was patched.
        """
        owner = self._owner()
        current = vars(owner).get(self.method)
        before = getattr(current, _BACKEND, None)
        if before is not None:
            if before != backend:
                raise ValueError(
                    f"{self.where} is patched already, with backend={before!r}: unpatch it before "
                    f"patching it with backend={backend!r}."
                )
            return False
        if not isinstance(current, FunctionType):
            raise InterfaceChanged(
                f"{self.where} of {self.seen()} is {current!r}, not a method. Nothing was patched."
            )
        check_parameters(current, self.parameters, self.where, self.seen())
        replacement = self.make(current, backend)
        setattr(replacement, _ORIGINAL, current)
        setattr(replacement, _BACKEND, backend)
        setattr(owner, self.method, replacement)
        return True

    def restore(self) -> None:
        """Put the very function back; nothing to do if it was never replaced."""
        owner = getattr(sys.modules.get(self.module), self.class_name, None)
        current = vars(owner).get(self.method) if owner is not None else None
        if hasattr(current, _ORIGINAL):
            setattr(owner, self.method, getattr(current, _ORIGINAL))

    def _owner(self) -> type:
        module = import_peer(self.module, self.package, self.remedy)
        owner = getattr(module, self.class_name, None)
        if not isinstance(owner, type):
            raise InterfaceChanged(
                f"{self.module} of {self.seen()} has no class {self.class_name}. "
                "Nothing was patched."
            )
        return owner


def seen(package: str) -> str:
    """``"<package> <version>"``."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} (no version: not installed by pip)"


def import_peer(module: str, package: str, remedy: str) -> Any:
    """A module of a peer.

    Raises:
        ImportError: the package is missing, or one that it needs, by name.
        InterfaceChanged: the package is there and has no such module.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        root = module.partition(".")[0]
        if missing == root:
            raise ImportError(f"{package} is not installed: {remedy}.") from error
        if missing.partition(".")[0] == root and module.startswith(missing):
            raise InterfaceChanged(
                f"{seen(package)} has no module {missing}; dpo_fast knows it with {module}. "
                "Nothing was patched."
            ) from error
        raise


class SaidOnce:
    """Logs each reason once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logging.getLogger("dpo_fast").info("%s", text)
