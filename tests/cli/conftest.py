"""Nothing of the machine that runs the tests leaks in."""

from tests.cards import card, clean_environment  # noqa: F401
