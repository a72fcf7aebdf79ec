"""The layout language as text: `expand` reads it, `shorten` writes the shortest text that reads the same.

The language is Megatron-LM's (``PipelineParallelLayerLayout.parse_str_to_list``): ``E t m L`` are layers, ``|`` ends a
stage, ``x*n`` repeats the one symbol *x* (``|`` too), ``(...)*n`` a group; commas mean nothing. Here groups nest,
blanks mean as little as commas, and text whose repeats Megatron-LM silently misreads is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from operator import add

from partita.errors import LayoutError

MAX_SYMBOLS = 10_000_000  # layers and bars of an expanded layout
MAX_DEPTH = 100  # groups open at once
MAX_SHORTEST = 256  # symbols up to which `shorten` searches every text

_TOKEN = re.compile(
    r"(?P<symbols>[EtmL|]+)|(?P<count>\d+)|(?P<star>\*)|(?P<open>\()|(?P<close>\))|(?P<blank>[,\s]+)"
    r"|(?P<end>\Z)|(?P<other>.)",
    re.DOTALL,
)

_NO_COUNT = "`*` needs a repeat count of at least 1 after it, as in t*3"
_NOTHING_TO_REPEAT = "`*` has nothing to repeat here: write the symbol or the group before it, as in t*3 or (tt|)*3"
_NO_STAR = "a repeat count needs `*` before it, as in t*3 or (tt|)*3"
_GROUP_ALONE = "the group before this is not repeated: write `*` and a count after it, or leave out its parentheses"

# The error for a token of the second kind directly after one of the first. All other pairs are allowed.
_MISPLACED = {
    ("start", "star"): _NOTHING_TO_REPEAT,
    ("start", "count"): _NO_STAR,
    ("open", "star"): _NOTHING_TO_REPEAT,
    ("open", "count"): _NO_STAR,
    ("open", "close"): "this group is empty: write what it repeats, as in (tt|)*3",
    ("symbols", "count"): _NO_STAR,
    **{("star", kind): _NO_COUNT for kind in ("symbols", "star", "open", "close", "end", "other")},
    **{("close", kind): _GROUP_ALONE for kind in ("symbols", "open", "close", "end")},
    ("close", "count"): _NO_STAR,
    ("count", "count"): "a repeat count cannot be split by commas or blanks (Megatron-LM would join the digits): "
    "write it in one piece, as in t*12, or name what the second count repeats, as in t*1,t*2",
    ("count", "star"): "a repeat cannot be repeated (Megatron-LM would repeat its last symbol only): "
    "write one count, as in (tt|)*4, or nest, as in ((tt|)*2)*2",
}

_MEANT = {"e": "E", "T": "t", "M": "m", "l": "L", "×": "*", "x": "*", "[": "(", "]": ")", "{": "(", "}": ")"}


def expand(layout: str) -> str:
    """Write out every repeat: the text of `layout` in the five symbols ``E t m L |`` alone.

    Time and memory are linear in the text plus its expansion, whose size is known before it is built.

    Raises:
        LayoutError: The text is not of the language, or stands for more than `MAX_SYMBOLS` symbols. The message points
            at the character.
    """
    parts: list[str] = []  # of the innermost open group; a repeat applies to the last
    outer: list[tuple[int, list[str]]] = []  # the open groups: where each opened, and the parts before it
    size = 0  # symbols of all open groups so far, a lower bound of the final size since counts are at least 1
    before = "start"
    for token in _TOKEN.finditer(layout):
        kind, text, at = str(token.lastgroup), token[0], token.start()
        if kind == "blank":
            continue
        if problem := _MISPLACED.get((before, kind)):
            raise _error(layout, at, problem)
        before = kind
        if kind == "symbols":
            size += len(text)
            parts += (text[:-1], text[-1])
        elif kind == "count":
            count = _count(layout, at, text)
            size += len(parts[-1]) * (count - 1)
            if size <= MAX_SYMBOLS:
                parts[-1] *= count
        elif kind == "open":
            if len(outer) == MAX_DEPTH:
                raise _error(layout, at, f"groups may nest at most {MAX_DEPTH} deep: write some of them out")
            outer.append((at, parts))
            parts = []
        elif kind == "close":
            if not outer:
                raise _error(layout, at, "no group is open here: leave out this `)`, or write `(` where it begins")
            group = "".join(parts)
            parts = outer.pop()[1]
            parts.append(group)
        elif kind == "other":
            raise _error(layout, at, _unknown(text))
        if size > MAX_SYMBOLS:
            problem = f"up to here the layout has more than {MAX_SYMBOLS:,} layers and stages: write a smaller count"
            raise _error(layout, at, problem)
    if outer:
        raise _error(layout, outer[-1][0], "this group is never closed: write `)*` and a count where it ends")
    return "".join(parts)


def _count(layout: str, at: int, digits: str) -> int:
    count = int(digits) if len(digits) <= 100 else MAX_SYMBOLS + 1
    if count == 0:
        raise _error(layout, at, "a repeat count must be at least 1: leave out what it repeats")
    if count > MAX_SYMBOLS:
        raise _error(layout, at, f"a repeat count may be at most {MAX_SYMBOLS:,}")
    return count


def _unknown(symbol: str) -> str:
    problem = f"{symbol!a} is not a symbol"
    if symbol in _MEANT:
        return f"{problem}: write {_MEANT[symbol]}"
    if symbol in "\\'\"":
        return f"{problem}: leave out quotes and backslashes that were meant for a shell"
    return f"{problem}: write E (embedding), t (decoder), m (multi-token prediction), L (loss), | (end of stage), * ( )"


def _error(layout: str, at: int, problem: str) -> LayoutError:
    """`problem`, with a caret under character `at` in a window of the layout that fits a line."""
    start, end = max(0, at - 40), min(len(layout), at + 40)
    head, tail = "..." if start else "", "..." if end < len(layout) else ""
    window = "".join(c if c.isprintable() else " " for c in layout[start:end])
    caret = " " * (len(head) + at - start) + "^"
    return LayoutError(f"Pipeline layout, character {at + 1}: {problem}.\n  {head}{window}{tail}\n  {caret}")


def shorten(expanded: str) -> str:
    """The text that `expand` reads as `expanded`, with as few characters as we find.

    Up to `MAX_SHORTEST` symbols no text is shorter; of equally short ones it has the fewest repeats, of
    whole stages where possible. Beyond, only runs of a layer inside a stage and repeats of whole stages are folded:
    that is quick and never longer than `expanded`, but not always the shortest.
    """
    return _search(expanded) if len(expanded) <= MAX_SHORTEST else _fold(expanded)


# What `_search` minimizes. The last two only choose between texts of one length.
_CHARACTER, _REPEAT, _INSIDE_STAGE = 10_000, 10, 1


def _search(text: str) -> str:
    """Shortest text by dynamic programming over intervals: O(n^3) for n symbols.

    Any text for ``text[i:j]`` is two texts in a row or one repeat, so with c[i][j] the least cost,

        c[i][j] = min(c[i][k] + c[k][j] for i < k < j,  cost of (text of text[i:i+p])*((j - i) / p) for each period p)

    and every interval's cost comes from shorter ones.
    """
    n = len(text)
    begin = [[0] * (n + 1) for _ in range(n + 1)]  # begin[i][j] = c[i][j]
    end = [[0] * (n + 1) for _ in range(n + 1)]  # end[j][i] = c[i][j]
    periods = [[p for p in range(length // 2, 0, -1) if length % p == 0] for length in range(n + 1)]
    repeat: dict[tuple[int, int], int] = {}  # (i, j) -> period, where a repeat is the best
    for length in range(1, n + 1):
        for i in range(n - length + 1):
            j = i + length
            best = min(map(add, begin[i][i + 1 : j], end[j][i + 1 : j]), default=_CHARACTER)
            for p in periods[length]:
                if text[i : j - p] == text[i + p : j]:
                    characters = (1 if p == 1 else 3) + len(str(length // p))
                    cost = begin[i][i + p] + _CHARACTER * characters + _REPEAT + _INSIDE_STAGE * (text[j - 1] != "|")
                    if cost <= best:
                        best = cost
                        repeat[i, j] = p
            begin[i][j] = end[j][i] = best

    def pieces(i: int, j: int) -> Iterator[str]:
        while i < j:
            # The longest repeat that begins the best text, or else its first symbol.
            repeats = (k for k in range(j, i + 1, -1) if (i, k) in repeat)
            k = next((k for k in repeats if begin[i][k] + begin[k][j] == begin[i][j]), i + 1)
            p = repeat.get((i, k))
            yield text[i] if p is None else _repeat("".join(pieces(i, i + p)), (k - i) // p)
            i = k

    return "".join(pieces(0, n))


def _repeat(text: str, count: int) -> str:
    return f"{text}*{count}" if len(text) == 1 else f"({text})*{count}"


def _runs(text: str) -> str:
    return re.sub(r"(.)\1{3,}", lambda run: _repeat(run[1], len(run[0])), text)


def _fold(expanded: str) -> str:
    """A short text by folding repeats of up to 64 stages (fewer beyond 100,000 stages), short periods first.

    Each distinct piece becomes one character, so that the regular-expression engine finds the repeats; each repeat
    found becomes a new character, so that later rounds find repeats of repeats.
    """
    *stages, last = expanded.split("|")
    pieces = [stage + "|" for stage in stages]
    if len(pieces) > 1 and pieces[0].endswith(pieces[1]):
        # So that Ett|t|t| is Et(t|)*3: most layouts begin like this.
        pieces[:1] = [pieces[0].removesuffix(pieces[1]), pieces[1]]
    # `MAX_SYMBOLS` symbols are too few for more distinct pieces than there are characters.
    character = {piece: chr(i) for i, piece in enumerate(dict.fromkeys(pieces))}
    texts = [_runs(piece) for piece in character]  # texts[ord(c)] is what character c stands for
    line = "".join(map(character.__getitem__, pieces))
    folded: dict[tuple[str, int], str] = {}

    def fold(match: re.Match[str]) -> str:
        body, count = match[1], len(match[0]) // len(match[1])
        if (body, count) not in folded and len(texts) <= sys.maxunicode:
            text = "".join(texts[ord(c)] for c in body)
            repeat = _repeat(text, count)
            folded[body, count] = chr(len(texts))
            texts.append(repeat if len(repeat) < len(text) * count else text * count)
        return folded.get((body, count), match[0])

    for reach in (1, 2, 4, 8, 16, 32, 64, 64):
        period = max(1, min(reach, 6_400_000 // max(1, len(line))))
        line = re.sub(rf"(.{{1,{period}}}?)\1+", fold, line, flags=re.DOTALL)
    return "".join(texts[ord(c)] for c in line) + _runs(last)
