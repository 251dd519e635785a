"""Overrides of every kind, sound and not: the parser sets an entry as the schema allows, or raises a ValueError."""

from __future__ import annotations

from fuzzing import fuzzed
from hypothesis import example, given
from hypothesis import strategies as st

from configs.mobilemamba import mobilemamba_t2s
from configs.overrides import _paths, apply_overrides, get_entry
from configs.values import convert

PATHS = sorted(_paths(mobilemamba_t2s.get_config()))
PARTS = sorted({part for path in PATHS for part in path.split(".")})

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4))
literals = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner), st.tuples(inner), st.dictionaries(scalars, inner)), max_leaves=6
)
values = st.one_of(
    literals.map(repr), st.text(), st.sampled_from(("", "None", "true", "[", "{1:", "1e999", "9" * 5000))
)
parts = st.one_of(st.sampled_from(PARTS), st.integers(-2, 9).map(str), st.text(max_size=6))
paths = st.one_of(st.sampled_from(PATHS), st.lists(parts, min_size=1, max_size=5).map(".".join))
extended = st.builds("{}.{}".format, st.sampled_from(PATHS), parts)
overrides = st.one_of(st.builds("{}={}".format, st.one_of(paths, extended), values), st.text())

EXTRA = "optim.optim_kwargs.extra"


@fuzzed
@given(st.lists(overrides, max_size=4))
@example([f"{EXTRA}={{'a': [1, 2]}}", f"{EXTRA}.a.0=3"])
@example([f"{EXTRA}.={{}}"])
@example([f"{EXTRA}.a.b=1"])
@example(["loss.loss_terms.9999999999999999999=1", "=", "."])
def test_override(arguments: list[str]) -> None:
    config = mobilemamba_t2s.get_config()
    try:
        given_paths = apply_overrides(config, arguments)
    except ValueError:
        return
    for path in given_paths:
        get_entry(config, path)
    convert(config, type(config), "")  # what was written is what the schema allows
