"""Probes of interfaces that belong to others: what is patched must look as it did when tested."""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any


class InterfaceChanged(RuntimeError):
    """A library that is to be patched has another interface than the one this code knows.

    Raised before anything is changed; the message names what differs and the version seen.
    """


def check_parameters(function: Any, expected: tuple[str, ...], name: str, seen: str) -> None:
    """``function`` takes exactly the parameters ``expected``, in this order.

    Args:
        name: how the message calls the function. seen: the library's version, for the message.

    Raises:
        InterfaceChanged: it does not.
    """
    if not callable(function):
        raise InterfaceChanged(f"{name} of {seen} is {function!r}, not a function.")
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise InterfaceChanged(
            f"{name} of {seen} takes ({', '.join(found)}); dpo_fast knows it with "
            f"({', '.join(expected)}). Nothing was patched: use a version of {seen.split()[0]} "
            "that this dpo_fast was tested with, or a newer dpo_fast."
        )


def reads_global(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function``, or a function defined inside of it, looks ``name`` up when it runs."""

    def within(code: CodeType) -> bool:
        inner = (const for const in code.co_consts if isinstance(const, CodeType))
        return name in code.co_names or any(within(const) for const in inner)

    return within(function.__code__)
