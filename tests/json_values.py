"""Hypothesis strategies of values that a JSON file can hold, odd numbers among them."""

from hypothesis import strategies as st

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([1e9, 1e300, -1e18, 2**70]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=8), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=10,
)
