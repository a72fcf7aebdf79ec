from hypothesis import example, given, settings
from hypothesis import strategies as st

from partita.core.layout.layout import Layout
from partita.core.layout.parser import MAX_SHORTEST, expand, shorten
from partita.errors import LayoutError

SYMBOLS = st.sampled_from("EtmL|")
SEPARATORS = st.text(", \n", max_size=2)


def times(unit):
    """(text, what it stands for) of a unit repeated, with separators wherever they are legal."""
    return st.builds(
        lambda pair, count, a, b: (f"{pair[0]}{a}*{b}{count}", pair[1] * count),
        unit,
        st.integers(1, 6),
        SEPARATORS,
        SEPARATORS,
    )


def row(unit, least):
    return st.builds(
        lambda pairs, gap: (gap.join(text for text, _ in pairs), "".join(meaning for _, meaning in pairs)),
        st.lists(unit, min_size=least, max_size=5),
        SEPARATORS,
    )


SYMBOL = SYMBOLS.map(lambda symbol: (symbol, symbol))
UNIT = st.recursive(
    SYMBOL | times(SYMBOL),
    lambda unit: times(row(unit, 1).map(lambda pair: (f"({pair[0]})", pair[1]))),
    max_leaves=12,
)
TEXT = row(UNIT, 0)


@given(TEXT)
def test_text_reads_as_built(pair):
    text, meaning = pair
    assert expand(text) == meaning
    assert Layout.get_num_stages_from_str(text) == meaning.count("|") + 1


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_str_parses_back_and_no_known_text_is_shorter(pair):
    text, meaning = pair
    layout = Layout(text, 1)
    assert Layout(str(layout), 1) == layout
    assert len(str(layout)) <= len(meaning)
    if len(meaning) <= MAX_SHORTEST:
        assert len(str(layout)) <= len("".join(c for c in text if c not in ", \n"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("EtmL|", min_size=1, max_size=12), min_size=1, max_size=4), st.data())
def test_large_layouts_parse_back(words, data):
    expanded = "".join(data.draw(st.lists(st.sampled_from(words).map(lambda word: word * 9), min_size=40, max_size=60)))
    text = shorten(expanded)
    assert expand(text) == expanded
    assert len(text) <= len(expanded)


@settings(max_examples=300, deadline=500)
@given(st.text("EtmLe|*(),0129 \n", max_size=40) | st.text(max_size=20))
@example("t*9999999" * 100)
def test_garbage_reads_or_is_refused(text):
    try:
        expanded = expand(text)
    except LayoutError:
        return
    assert set(expanded) <= set("EtmL|")
    assert expand(shorten(expanded)) == expanded


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | SYMBOLS | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=500)
@given(ANYTHING, ANYTHING)
def test_anything_reads_or_is_refused(layout, size):
    try:
        read = Layout(layout, size)
    except LayoutError:
        return
    assert read.num_stages == read.pipeline_model_parallel_size * read.virtual_pipeline_model_parallel_size
    assert Layout(read.stages, size) == read


@given(st.lists(st.text("EtmL", max_size=6), min_size=1, max_size=12), st.integers(1, 12))
def test_layer_ids_count_through_the_stages_in_order(stages, pp):
    stages += [""] * (-len(stages) % pp)
    layout = Layout(stages, pp)
    for kind in set(layout.flatten_layout):
        ids = []
        for vp_stage in range(len(stages) // pp):
            for pp_rank in range(pp):
                here = layout.get_layer_id_list(kind, vp_stage, pp_rank)
                assert layout.get_layer_offset(kind, vp_stage, pp_rank) == len(ids)
                assert len(here) == layout.layout[pp_rank][vp_stage].count(kind)
                ids += here
        assert ids == list(range(layout.flatten_layout.count(kind)))
