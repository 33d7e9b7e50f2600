"""How hard the fuzz tests look: a few dozen examples each in `make test`, a night's worth by hand.

pytest --hypothesis-profile long tests/fuzz
"""

from hypothesis import settings

QUICK = 30
"""Examples of a test; all tests of tests/fuzz together then take a few seconds of a core."""

fuzzed = settings(
    deadline=None, max_examples=max(QUICK, settings().max_examples if settings().max_examples > 100 else 0)
)
"""The decorator of every fuzz test; a profile that asks for more than Hypothesis's own 100 has its way."""
