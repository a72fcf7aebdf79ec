import copy
import enum
import pickle
import time
import tracemalloc

import pytest

from partita.core.layout import layout as layout_module
from partita.core.layout.layout import LayerType, Layout, PipelineParallelLayerLayout, set_default_pipeline_rank
from partita.core.layout.parser import expand, shorten
from partita.errors import LayoutError

E, t, m, L = LayerType.embedding, LayerType.decoder, LayerType.mtp, LayerType.loss

DEEPSEEK = "Et*3|(tt|)*29,m|L"  # Megatron-LM's own example: 61 decoder layers and one MTP layer on 16 ranks


def symbols(stages):
    return "|".join("".join(layer.value for layer in stage) for stage in stages)


# text, its stages written out. Most are from Megatron-LM's documents and tests, or from its users' scripts.
READS = [
    ("", ""),
    ("|", "|"),
    ("E||t|L", "E||t|L"),
    ("E|t|", "E|t|"),
    ("Ettt|(tt|)*29,m|L", "Ettt" + "|tt" * 29 + "|m|L"),
    (DEEPSEEK, "Ettt" + "|tt" * 29 + "|m|L"),
    ("E|t*3|(t|)*5mL", "E|ttt|t|t|t|t|t|mL"),
    ("E|t*3|(t|)*4tm|L", "E|ttt|t|t|t|t|tm|L"),
    ("E|t*3|(t|)*3tt|m|L", "E|ttt|t|t|t|tt|m|L"),
    ("Et*4|(tttt|)*14tmL", "Etttt" + "|tttt" * 14 + "|tmL"),
    ("E(|tt)*30,|mL", "E" + "|tt" * 30 + "|mL"),
    ("Et|t|(tt|)*29tL", "Et|t" + "|tt" * 29 + "|tL"),
    ("Et*2|(tt|)*22t|(tt|)*7mL", "Ett" + "|tt" * 22 + "|t" + "|tt" * 7 + "|mL"),
    ("Et*16|t*16|t*16|t*12,m,L", "E" + "t" * 16 + "|" + "t" * 16 + "|" + "t" * 16 + "|" + "t" * 12 + "mL"),
    ("Et*4|(t*4|)*6t*3mL", "Etttt" + "|tttt" * 6 + "|tttmL"),
    ("E,t*4|t*4,L", "Etttt|ttttL"),
    ("xy(ab|cd|ef)*2,pq".translate(str.maketrans("xyabcdefpq", "EtttmmttmL")), "Ettt|mm|tttt|mm|ttmL"),
    ("tt,(mm|)*2", "ttmm|mm|"),
    ("(|tt)*2,mm", "|tt|ttmm"),
    ("E|*3L", "E|||L"),
    ("t*1,t*2", "ttt"),
    ("t,*,3", "ttt"),
    ("(t|,)*2", "t|t|"),
    ("t*007", "ttttttt"),
    ("t*３", "ttt"),  # a full-width digit: Megatron-LM reads it as 3 too
    # Beyond Megatron-LM.
    (" E t * 3 | ( t | ) * 2\n\tL ", "Ettt|t|t|L"),
    ("((t|)*2m|)*3", "t|t|m|" * 3),
    ("E(t(t*2|m)*2|)*2L", "Et" + "tt|m" * 2 + "|t" + "tt|m" * 2 + "|L"),
]


@pytest.mark.parametrize(("text", "stages"), READS)
def test_text_reads_as_its_author_meant(text, stages):
    parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert symbols(parsed) == stages
    assert all(isinstance(stage, list) for stage in parsed)
    assert PipelineParallelLayerLayout.get_num_stages_from_str(text) == len(parsed)
    layout = PipelineParallelLayerLayout.from_str(text, 1)
    assert symbols(layout.stages) == stages
    assert Layout(str(layout), 1) == layout


# text, the number of the character that the caret is under, what the message must say
REFUSED = [
    ("t*1,2", 5, "write it in one piece, as in t*12"),
    ("t*1 2", 5, "cannot be split"),
    ("(tt|)*2*2", 8, "or nest, as in ((tt|)*2)*2"),
    ("t*2*2", 4, "a repeat cannot be repeated"),
    ("ett|L", 1, "write E"),
    ("Ett|l", 5, "write L"),
    ("ET|L", 2, "write t"),
    ("Et|M|L", 4, "write m"),
    ("E[t|]*2", 2, "write ("),
    ("Et|X", 4, "is not a symbol: write E (embedding)"),
    ("'Et|L'", 1, "shell"),
    ("Et\\|L", 3, "shell"),
    ("t3", 2, "needs `*` before it"),
    ("3t", 1, "needs `*` before it"),
    ("(t|)3", 5, "needs `*` before it"),
    ("(2t)*2", 2, "needs `*` before it"),
    ("*3", 1, "nothing to repeat"),
    ("E(*3t|)*2", 3, "nothing to repeat"),
    ("t**2", 3, "needs a repeat count"),
    ("t*", 3, "needs a repeat count"),
    ("t*-1", 3, "needs a repeat count"),
    ("t*(2)*2", 3, "needs a repeat count"),
    ("(t*)*2", 4, "needs a repeat count"),
    ("t*0", 3, "must be at least 1"),
    ("t*" + "9" * 10_000, 3, "at most 10,000,000"),
    ("(tt|)", 6, "is not repeated"),
    ("(tt|)L", 6, "is not repeated"),
    ("((t)|)*2", 5, "is not repeated"),
    ("()*2", 2, "this group is empty"),
    ("( , )*2", 5, "this group is empty"),
    ("E(t", 2, "never closed"),
    ("((t|)*2", 1, "never closed"),
    ("t)*2", 2, "no group is open"),
    ("t*10000001", 3, "at most 10,000,000"),
    ("t*6000000,(t*6)*1000000", 17, "more than 10,000,000 layers and stages"),
    ("(" * 100_000, 101, "at most 100 deep"),
    ("t" * 50 + "e" + "t" * 50, 51, "write E"),
    ("t\ud800", 2, "'\\ud800' is not a symbol"),
]


@pytest.mark.parametrize(("text", "character", "says"), REFUSED, ids=lambda value: ascii(value)[:30])
def test_a_refusal_points_at_the_character(text, character, says):
    with pytest.raises(LayoutError) as caught:
        Layout(text, 1)
    message, window, caret = str(caught.value).splitlines()
    assert f"character {character}:" in message
    assert says in message
    column = caret.index("^")
    assert len(window) < 100
    if character <= len(text):
        expected = text[character - 1]
        assert window[column] == (expected if expected.isprintable() else " ")
    else:
        assert column == len(window)


def test_the_whole_message():
    with pytest.raises(LayoutError) as caught:
        Layout("Et|(tt|)*2*2", 1)
    assert str(caught.value) == (
        "Pipeline layout, character 11: a repeat cannot be repeated (Megatron-LM would repeat its last symbol only): "
        "write one count, as in (tt|)*4, or nest, as in ((tt|)*2)*2.\n"
        "  Et|(tt|)*2*2\n"
        "            ^"
    )


def test_huge_texts_are_refused_unexpanded():
    bombs = [
        "(((t*999)*999)*999)*999",
        "(" * 99 + "t" + ")*9999999" * 99,
        "t*9999999(" * 99,
        "(t*9999999)*2",
        "t*" + "0" * 100_000 + "1",
        "(" * 1_000_000,
        "t*" * 1_000_000,
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(LayoutError):
                expand(bomb)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20  # the largest text that is allowed takes 20 MB
    finally:
        tracemalloc.stop()


def test_the_largest_layout_reads():
    assert len(expand("(t*9999,)*1000t*1000")) == 10_000_000
    with pytest.raises(LayoutError, match="more than 10,000,000"):
        expand("(t*9999,)*1000t*1001")
    assert len(expand("(" * 100 + "t" + ")*1" * 100)) == 1


@pytest.mark.parametrize(
    "text", ["E" + "t*3|" * 99_999 + "L", "E" + "tt|" * 99_999 + "L", "E(tt|)*99999L"], ids=lambda text: text[:9]
)
def test_100_000_stages_are_quick(text):
    start_s = time.process_time()
    layout = Layout(text, 1000)
    again = Layout(str(layout), 1000)
    assert time.process_time() - start_s < 30  # CPU time: linear work takes 0.1 s, quadratic work minutes
    assert again == layout
    assert layout.num_stages == 100_000
    assert len(str(layout)) < 30
    assert layout.get_layer_id_list(vp_stage=99, pp_rank=998)[-1] == layout.flatten_layout.count(t) - 1


# The list form

LISTS = [
    [["embedding", "decoder"], ["decoder", "mtp", "loss"]],
    [[E, t], [t, m, L]],
    [["E", "t"], ["t", "m", "L"]],
    [[E, "t"], (" Decoder ", "MTP", "L")],
    ([E, t], ["t", "m", L]),
    ["Et", "tmL"],
    ["E,t*1", ["decoder", "mtp", "loss"]],
]


@pytest.mark.parametrize("given", LISTS)
def test_lists_read_as_the_text(given):
    layout = Layout(given, 2)
    assert layout == Layout("Et|tmL", 2)
    assert repr(layout) == f"PipelineParallelLayerLayout({given!r}, 2)"


def test_lists_take_megatrons_own_enum():
    theirs = enum.Enum("LayerType", ["embedding", "loss", "encoder", "decoder", "mtp"])
    layout = Layout([[theirs.embedding, theirs.decoder], [theirs.decoder, theirs.mtp, theirs.loss]], 2)
    assert layout == Layout("Et|tmL", 2)
    assert layout.get_num_layers_to_build(theirs.decoder, 0, 0) == 1
    with pytest.raises(LayoutError, match="'encoder'"):
        Layout([[theirs.encoder]], 1)


def test_stages_may_be_empty():
    assert Layout([["E"], [], "", ["t", "L"]], 2) == Layout("E|||tL", 2)
    assert Layout([[]], 1) == Layout("", 1)


ITSELF: list = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    ("layout", "pp", "says"),
    [
        (None, 1, "but is None"),
        (b"Et|L", 1, "of type bytes"),
        ({"E": 1}, 1, "of type dict"),
        (7, 1, "of type int"),
        ([], 1, "empty list"),
        (ITSELF, 1, "of type list"),
        ([["E"], None], 2, r"`layout\[1\]` must be one stage"),
        ([E, t], 2, r"`layout\[0\]` must be one stage"),
        (["embedding", "decoder"], 2, r"write \['embedding'\] for a stage of it alone"),
        (["E|t", "L"], 2, "give each stage an item of its own"),
        (["E", "t*0"], 2, r"(?s)`layout\[1\]`: .*character 3.*at least 1"),
        ([["E", "e"]], 1, "but is 'e'"),
        ([["encoder"]], 1, "but is 'encoder'"),
        ([[None]], 1, "a layer must be a LayerType, a name or a symbol, but is None"),
        ([[["E"]]], 1, "of type list"),
        (["t*6000000"] * 2, 2, "more than 10,000,000"),
        ("t", True, "must be a whole number, at least 1, but is of type bool"),
        ("t", 1.0, "of type float"),
        ("t", "1", "of type str"),
        ("t", None, "is None"),
        ("t", 0, "at least 1, but is 0"),
        ("t", -3, "at least 1, but is -3"),
    ],
)
def test_bad_arguments(layout, pp, says):
    with pytest.raises(LayoutError, match=says):
        Layout(layout, pp)


def test_a_size_too_long_to_print():
    with pytest.raises(LayoutError, match=r"\(a number of 16610 bits\), but is 1 instead"):
        Layout("t", 10**5000)


@pytest.mark.parametrize("given", [None, 3, ["Et", "L"]])
def test_text_functions_refuse_what_is_no_text(given):
    for function in (Layout.parse_str_to_list, Layout.get_num_stages_from_str, lambda given: Layout.from_str(given, 1)):
        with pytest.raises(LayoutError, match="must be a text here"):
            function(given)


@pytest.mark.parametrize(
    ("text", "pp", "says"),
    [
        (
            "E|t|t|t|t|L",
            4,
            r"of `pipeline_model_parallel_size` \(4\), but is 6 instead: add 2 .*, remove 2, .* of 3$",
        ),
        ("E|L", 4, r"but is 2 instead: add 2 \(a stage may be empty\), or use a `pipeline_model_parallel_size` of 2$"),
        ("Et|(tt|)*3", 4, r"but is 5 .*add 3 .*remove 1, .*of 1\. The last stage is empty, because `\|` ends"),
    ],
)
def test_stages_must_be_a_multiple_of_the_ranks(text, pp, says):
    with pytest.raises(LayoutError, match=says):
        Layout(text, pp)


# Queries

# 10 decoder layers on 3 ranks with 2 virtual stages: one row per rank, one column per virtual stage.
GRID = "Et|ttt||tt|tttt,m|mL"
EXPECTED = {
    #    vp 0             vp 1
    t: [[[0], [4, 5]], [[1, 2, 3], [6, 7, 8, 9]], [[], []]],
    m: [[[], []], [[], [0]], [[], [1]]],
    E: [[[0], []], [[], []], [[], []]],
    L: [[[], []], [[], []], [[], [0]]],
}
OFFSETS = {
    t: [[0, 4], [1, 6], [4, 10]],
    m: [[0, 0], [0, 0], [0, 1]],
    E: [[0, 1], [1, 1], [1, 1]],
    L: [[0, 0], [0, 0], [0, 0]],
}


def test_queries_by_stage():
    layout = Layout(GRID, 3)
    assert (layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size) == (3, 2)
    for kind in LayerType:
        ids = [[layout.get_layer_id_list(kind, vp, pp) for vp in range(2)] for pp in range(3)]
        counts = [[layout.get_num_layers_to_build(kind, vp, pp) for vp in range(2)] for pp in range(3)]
        offsets = [[layout.get_layer_offset(kind, vp, pp) for vp in range(2)] for pp in range(3)]
        assert ids == EXPECTED[kind]
        assert counts == [[len(stage) for stage in row] for row in EXPECTED[kind]]
        assert offsets == OFFSETS[kind]
    assert layout.get_layer_id_list("mtp", vp_stage=1, pp_rank=2) == [1]
    assert layout.get_layer_id_list(vp_stage=1, pp_rank=0) == [4, 5]  # decoder layers unless told


def test_attributes():
    layout = Layout(GRID, 3)
    assert layout.layout == (((E, t), (t, t)), ((t, t, t), (t, t, t, t, m)), ((), (m, L)))
    assert layout.stages == ((E, t), (t, t, t), (), (t, t), (t, t, t, t, m), (m, L))
    assert layout.flatten_layout == (E, *[t] * 10, m, m, L)
    assert layout.num_stages == 6


def test_one_virtual_stage_needs_no_vp_stage():
    layout = Layout("Et|tt|tL", 3)
    assert [layout.get_layer_id_list(pp_rank=rank) for rank in range(3)] == [[0], [1, 2], [3]]
    assert layout.get_layer_offset(pp_rank=2, vp_stage=0) == 3


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"pp_rank": 0}, "`vp_stage` is needed, since each pipeline rank has 2 stages"),
        ({"vp_stage": 0}, r"pass it, or call partita\.torch\.init_parallelism\(\) first"),
        ({"vp_stage": 2, "pp_rank": 0}, "`vp_stage` must be from 0 to 1, but is 2"),
        ({"vp_stage": -1, "pp_rank": 0}, "`vp_stage` must be from 0 to 1, but is -1"),
        ({"vp_stage": 0, "pp_rank": 3}, "`pp_rank` must be from 0 to 2, but is 3"),
        ({"vp_stage": 0, "pp_rank": -1}, "`pp_rank` must be from 0 to 2, but is -1"),
        ({"vp_stage": 0, "pp_rank": True}, "of type bool"),
        ({"vp_stage": "0", "pp_rank": 0}, "of type str"),
        ({"vp_stage": 0, "pp_rank": 0, "layer_type": "e"}, "one of embedding"),
        ({"vp_stage": 0, "pp_rank": 0, "layer_type": 4}, "of type int"),
    ],
)
@pytest.mark.parametrize("name", ["get_num_layers_to_build", "get_layer_offset", "get_layer_id_list"])
def test_bad_queries(name, query, says):
    with pytest.raises(LayoutError, match=says):
        getattr(Layout(GRID, 3), name)(**query)


def test_the_engine_says_the_default_rank(monkeypatch):
    monkeypatch.setattr(layout_module, "_pipeline_rank", None)
    layout = Layout("Et|tt|tL", 3)
    set_default_pipeline_rank(lambda: 1)
    assert layout.get_layer_id_list() == [1, 2]
    assert layout.get_layer_id_list(pp_rank=0) == [0]
    set_default_pipeline_rank(lambda: 7)
    with pytest.raises(LayoutError, match="`pp_rank` must be from 0 to 2, but is 7"):
        layout.get_layer_offset()
    for provider in (None, lambda: None):
        set_default_pipeline_rank(provider)
        with pytest.raises(LayoutError, match="pass it, or call"):
            layout.get_layer_offset()


# Validation


@pytest.mark.parametrize(
    ("text", "num_layers", "mtp_num_layers", "standalone"),
    [
        (DEEPSEEK, 61, 1, True),
        ("E|t*3|(t|)*5mL", 8, 1, False),
        ("E|t*3|(t|)*4tm|L", 8, 1, True),
        ("E|t*3|(t|)*3tt|m|L", 8, 1, True),
        ("E||t|L", 1, 0, False),
        ("E||t|L", 1, None, False),
        ("EL", 0, 0, False),
        ("|Et|tL|", 2, 0, False),  # empty stages at the ends
        ("Et|tm|m|mL", 2, 3, True),  # spread over stages, which Megatron-LM refuses
        ("Et|tmmL||", 2, 2, False),  # with the loss, though not in the last stage
    ],
)
def test_layouts_that_fit(text, num_layers, mtp_num_layers, standalone):
    layout = Layout(text, 1)
    assert layout.validate_layer_layout(num_layers, mtp_num_layers) is standalone


@pytest.mark.parametrize(
    ("text", "pp", "num_layers", "mtp_num_layers", "violations"),
    [
        ("Et|tL", 2, 3, 0, ["decoder (t): 3 expected, 2 found; add 1"]),
        ("Ettt|tL", 2, 3, None, ["decoder (t): 3 expected, 4 found; remove 1"]),
        ("Et|tL", 2, 2, 2, ["mtp (m): 2 expected, 0 found; add 2"]),
        ("Et|tmL", 2, 2, None, ["mtp (m): 0 expected, 1 found; remove 1"]),
        (
            "tE|L",
            1,
            1,
            0,
            ["the embedding (E) must be the first layer, but one is later, in stage 0 (PP rank 0, VPP rank 0)"],
        ),
        (
            "",
            1,
            1,
            0,
            [
                "embedding (E): 1 expected, 0 found; add 1",
                "decoder (t): 1 expected, 0 found; add 1",
                "loss (L): 1 expected, 0 found; add 1",
            ],
        ),
        (
            "mt|tLE|L|t",
            2,
            5,
            0,
            [
                "decoder (t): 5 expected, 3 found; add 2",
                "mtp (m): 0 expected, 1 found; remove 1",
                "loss (L): 1 expected, 2 found; remove 1",
                "the embedding (E) must be the first layer, but one is later, in stage 1 (PP rank 1, VPP rank 0)",
                "the loss (L) must be the last layer, but one is earlier, in stage 1 (PP rank 1, VPP rank 0)",
                (
                    "mtp layers (m) must follow every decoder layer (t), "
                    "but one in stage 0 (PP rank 0, VPP rank 0) precedes one in stage 3 (PP rank 1, VPP rank 1)"
                ),
            ],
        ),
        (
            "E|E|t|L",
            2,
            1,
            0,
            [
                "embedding (E): 1 expected, 2 found; remove 1",
                "the embedding (E) must be the first layer, but one is later, in stage 1 (PP rank 1, VPP rank 0)",
            ],
        ),
    ],
)
def test_every_violation_is_reported_at_once(text, pp, num_layers, mtp_num_layers, violations):
    with pytest.raises(LayoutError) as caught:
        Layout(text, pp).validate_layer_layout(num_layers, mtp_num_layers)
    head, *lines = str(caught.value).splitlines()
    assert head == f"The layout {str(Layout(text, pp))!r} does not fit the model:"
    assert lines == [f"  - {violation}" for violation in violations]


@pytest.mark.parametrize(
    ("num_layers", "mtp"), [(-1, 0), (None, 0), (True, 0), ("2", 0), (2, -1), (2, False), (2, "0")]
)
def test_validation_refuses_what_is_no_count(num_layers, mtp):
    with pytest.raises(LayoutError, match="must be"):
        Layout("Et|tL", 2).validate_layer_layout(num_layers, mtp)


# Printing


def test_pretty_repr():
    assert Layout("Ettt|(tt|)*29,m|L", 16).pretty_repr().splitlines() == [
        "                    VPP rank 0                 VPP rank 1",
        "PP rank 0           embedding,decoder*3        decoder*2",
        "PP rank 1-13        decoder*2                  decoder*2",
        "PP rank 14          decoder*2                  mtp",
        "PP rank 15          decoder*2                  loss",
    ]
    assert Layout("E|||tmtL", 4).pretty_repr().splitlines() == [
        "                   VPP rank 0",
        "PP rank 0          embedding",
        "PP rank 1-2        (empty stage)",
        "PP rank 3          decoder,mtp,decoder,loss",
    ]


def test_equal_rows_that_are_not_neighbours_stay_apart():
    names = [row.split("  ")[0] for row in Layout("t|t|tt|t|t|t", 6).pretty_repr().splitlines()[1:]]
    assert names == ["PP rank 0-1", "PP rank 2", "PP rank 3-5"]


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("", ""),
        ("ttt", "ttt"),  # as long as t*3
        ("tttt", "t*4"),
        ("t*10", "t*10"),
        ("||||", "|*4"),
        ("tt|tt|", "tt|tt|"),
        ("tt|tt|tt|", "(tt|)*3"),
        (DEEPSEEK, "Et(tt|)*30m|L"),
        ("E|t*3|(t|)*5mL", "E|tt(t|)*6mL"),
        ("Et*2|(tt|)*83tL", "E(tt|)*84tL"),
        ("((ttt|)*4m|)*6", "((ttt|)*4m|)*6"),
        ("t*256", "t*256"),
        ("t*257", "t*257"),
        ("E" + "t|" * 500 + "L", "E(t|)*500L"),
        ("Et*1000L", "Et*1000L"),
        ("((tt|)*9m|)*50|*30E", "((tt|)*9m|)*50|*30E"),
        ("(tttt|tttt|m|)*300", "(t*4|t*4|m|)*300"),
        ("Ettt|(tt|)*253,m|L", "Et(tt|)*254m|L"),
        ("E|*300L", "E|*300L"),
    ],
)
def test_str_is_the_shortest(text, shortest):
    assert str(Layout(text, 1)) == shortest


def shortest_lengths(symbols, longest):
    """The length of the shortest text of each string of up to `longest` symbols.

    Writes every text of the language, short ones first. rows[n] are the strings that texts of n characters stand for,
    units[n] those of one symbol or one repeat.
    """
    rows, units, best = [{""}], [set()], {"": 0}
    for n in range(1, longest + 1):
        units.append(set(symbols) if n == 1 else set())
        for count in range(2, longest + 1):
            body = n - len(f"*{count}")
            bodies = set(symbols) if body == 1 else rows[body - 2] if body > 2 else set()
            units[n] |= {text * count for text in bodies if len(text) * count <= longest}
        pairs = ((first, rest) for k in range(1, n + 1) for first in units[k] for rest in rows[n - k])
        rows.append({first + rest for first, rest in pairs if len(first + rest) <= longest})
        for text in rows[n]:
            best.setdefault(text, n)
    return best


@pytest.mark.parametrize(("symbols", "longest"), [("t|", 11), ("tm|", 7)])
def test_no_text_is_shorter(symbols, longest):
    best = shortest_lengths(symbols, longest)
    assert len(best) == sum(len(symbols) ** n for n in range(longest + 1))
    found = {text: shorten(text) for text in best}
    assert {text: len(short) for text, short in found.items()} == best
    assert all(expand(short) == text for text, short in found.items())


# Objects


def test_equality_and_hash():
    a, b = Layout("Et|t|t|tL", 2), Layout([["embedding", "t"], "t", "t", ["t", L]], 2)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, Layout("Et|t|t|tL", 4), Layout("Et|t|tt|L", 2)}) == 3
    assert a != "Et|t|t|tL"


def test_layouts_are_immutable():
    given = [["E", "t"], ["L"]]
    layout = Layout(given, 2)
    before = repr(layout)
    given[0].append("t")
    given.pop()
    assert repr(layout) == before
    assert layout == Layout("Et|L", 2)
    for name in ("pipeline_model_parallel_size", "layout", "stages", "anything"):
        with pytest.raises(AttributeError):
            setattr(layout, name, 1)
    with pytest.raises(AttributeError):
        del layout.pipeline_model_parallel_size


def test_layouts_pickle_and_copy():
    layout = Layout(DEEPSEEK, 16)
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), Layout(layout.stages, 16)):
        assert other == layout
        assert str(other) == str(layout)


def test_repr_shows_what_was_given():
    assert repr(Layout(DEEPSEEK, 16)) == "PipelineParallelLayerLayout('Et*3|(tt|)*29,m|L', 16)"
    assert repr(Layout([[E, "decoder"], "L"], 2)) == (
        "PipelineParallelLayerLayout([[LayerType.embedding, 'decoder'], 'L'], 2)"
    )
