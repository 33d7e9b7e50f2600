"""How hard the fuzz tests look: a few dozen examples each in `make test`, a night's worth by hand.

pytest --hypothesis-profile long tests/fuzz
"""

from hypothesis import settings

QUICK = 30
"""Examples of a test; all tests of tests/fuzz together then take a few seconds of a core."""

ASKED = settings().max_examples
"""Of the profile that is loaded; Hypothesis's own is 100."""

fuzzed = settings(deadline=None, max_examples=max(QUICK, ASKED if ASKED > 100 else 0), derandomize=ASKED <= 100)
"""The decorator of every fuzz test: the same examples each time; new ones where a profile asks for more than 100."""
