"""The checker of the exercises: feedback in one sentence, never an error of its own."""

from collections.abc import Callable

__all__ = ["check"]


class Unsolved(Exception):  # noqa: N818 (not an error)
    """The dots are still there."""


def solved(answer):
    """Return the answer, or a function that raises `Unsolved` where it returns nothing.

    Raises `Unsolved` if the answer is missing: `None`, or still the dots (`...`).
    """
    if answer is None or answer is ...:
        raise Unsolved
    if not callable(answer) or isinstance(answer, type):
        return answer
    return lambda *given, **named: solved(answer(*given, **named))


def feedback(answer, claims) -> str:
    """One sentence: nothing to check, the first claim that fails, or all of them hold.

    A claim is a pair: a test of the answer, and what must hold. Errors in the reader's code
    are feedback too.
    """
    for test, why in claims:
        try:
            holds = bool(test(solved(answer)))
        except Unsolved:
            return "Nothing to check yet: replace the dots in the cell above."
        except Exception as error:  # the reader's code may do anything
            return f"Not yet: {why}. (It raised {type(error).__name__}: {error})"
        if not holds:
            return f"Not yet: {why}."
    return f"Right: all {len(claims)} checks hold."


def check(answer: Callable, *claims) -> None:
    """Print the feedback on an answer; a claim is (test of the answer, what must hold)."""
    print(feedback(answer, claims))
