"""Which layers a pipeline stage holds: `PipelineParallelLayerLayout`, after Megatron-LM's class of that name.

Stage *i* runs on pipeline rank ``i % pp`` as its virtual stage ``i // pp``, and stages run in the order 0, 1, 2, ...
Source of the names: Megatron-LM, ``megatron/core/transformer/pipeline_parallel_layer_layout.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import accumulate, groupby
from typing import final

from partita.core.layout.parser import MAX_SYMBOLS, expand, shorten
from partita.errors import LayoutError


class LayerType(Enum):
    """What a layer is. The value is its symbol in the layout language."""

    embedding = "E"
    decoder = "t"
    mtp = "m"
    loss = "L"

    def __repr__(self) -> str:
        return f"LayerType.{self.name}"


_OF_SYMBOL = {kind.value: kind for kind in LayerType}

_pipeline_rank: Callable[[], int | None] | None = None


def set_default_pipeline_rank(provider: Callable[[], int | None] | None) -> None:
    """Use `provider` for this process's pipeline rank in queries without `pp_rank`; it returns None if it does not know one.

    An engine registers it when it is imported. `provider` None removes it.
    """
    global _pipeline_rank
    _pipeline_rank = provider


@final
@dataclass(frozen=True, init=False, repr=False)
class PipelineParallelLayerLayout:
    """The layers of every stage of a pipeline. Immutable; equal when stages and `pipeline_model_parallel_size` are.

    `str()` is the shortest text of the layout language that reads the same (see `layout_parser.shorten` for how short),
    `repr()` shows what was given.

    Args:
        layout: Text such as ``"Ettt|(tt|)*29,m|L"``: ``E`` embedding, ``t`` decoder, ``m`` multi-token prediction,
            ``L`` loss, ``|`` ends a stage, ``x*n`` and ``(...)*n`` repeat. Or a list with one item for each stage: a
            list of layers (`LayerType`, full name or symbol) or such a text without ``|``. Stages may be empty.
        pipeline_model_parallel_size: Pipeline ranks, at least 1; the number of stages is a multiple of it.

    Raises:
        LayoutError: `layout` is malformed, or the number of stages is not a multiple of the ranks.

    Examples:
        >>> layout = Layout("Et*3|(tt|)*2tL", pipeline_model_parallel_size=2)
        >>> layout.num_stages, layout.virtual_pipeline_model_parallel_size
        (4, 2)
        >>> layout.get_layer_id_list("decoder", vp_stage=1, pp_rank=0)
        [5, 6]
        >>> str(Layout([["embedding", "decoder", "decoder"], ["decoder", "decoder", "loss"]], 2))
        'Ett|ttL'
    """

    pipeline_model_parallel_size: int
    _expanded: str  # every stage's symbols, joined by "|"
    _given: str = field(compare=False)

    def __init__(
        self, layout: str | Sequence[str | Sequence[LayerType | str]], pipeline_model_parallel_size: int
    ) -> None:
        pp = _whole("pipeline_model_parallel_size", pipeline_model_parallel_size, at_least=1)
        expanded = _read(layout)
        num_stages = expanded.count("|") + 1
        if num_stages % pp:
            raise LayoutError(_uneven(expanded, num_stages, pp))
        object.__setattr__(self, "pipeline_model_parallel_size", pp)
        object.__setattr__(self, "_expanded", expanded)
        object.__setattr__(self, "_given", repr(layout))

    @classmethod
    def from_str(cls, layout: str, pipeline_model_parallel_size: int) -> PipelineParallelLayerLayout:
        """The layout that a text of the layout language stands for."""
        return cls(_text(layout), pipeline_model_parallel_size)

    @staticmethod
    def parse_str_to_list(layout_str: str) -> list[list[LayerType]]:
        """The layers of each stage, in order: ``"Et|t|L"`` reads [[embedding, decoder], [decoder], [loss]]."""
        return [[_OF_SYMBOL[symbol] for symbol in stage] for stage in expand(_text(layout_str)).split("|")]

    @staticmethod
    def get_num_stages_from_str(layout: str) -> int:
        """Number of stages (pipeline ranks times virtual stages) that a text of the layout language has."""
        return expand(_text(layout)).count("|") + 1

    @property
    def num_stages(self) -> int:
        """Pipeline ranks times virtual stages."""
        return len(self._stages)

    @property
    def virtual_pipeline_model_parallel_size(self) -> int:
        """Stages on each pipeline rank."""
        return self.num_stages // self.pipeline_model_parallel_size

    @cached_property
    def stages(self) -> tuple[tuple[LayerType, ...], ...]:
        """The layers of each stage, in the order the stages run."""
        layers = {stage: tuple(map(_OF_SYMBOL.__getitem__, stage)) for stage in set(self._stages)}
        return tuple(map(layers.__getitem__, self._stages))

    @cached_property
    def layout(self) -> tuple[tuple[tuple[LayerType, ...], ...], ...]:
        """The layers of ``layout[pp_rank][vp_stage]``. Megatron-LM has lists where these are tuples."""
        pp = self.pipeline_model_parallel_size
        return tuple(self.stages[rank::pp] for rank in range(pp))

    @cached_property
    def flatten_layout(self) -> tuple[LayerType, ...]:
        """Every layer, in the order the layers run."""
        return tuple(layer for stage in self.stages for layer in stage)

    def get_num_layers_to_build(
        self,
        layer_type: LayerType | str = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Number of layers of a type in one stage.

        Args:
            layer_type: Type of the layers that count.
            vp_stage: Virtual stage; may be left out where a pipeline rank has only one.
            pp_rank: Pipeline rank; without it, this process's, once parallelism is initialized.

        Raises:
            LayoutError: `vp_stage` or `pp_rank` is out of range, or is needed and absent.
        """
        return self._stages[self._stage(vp_stage, pp_rank)].count(_symbol(layer_type, "`layer_type`"))

    def get_layer_offset(
        self,
        layer_type: LayerType | str = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Number of layers of a type in the stages that run before one. Arguments as in `get_num_layers_to_build`."""
        return self._offsets[_symbol(layer_type, "`layer_type`")][self._stage(vp_stage, pp_rank)]

    def get_layer_id_list(
        self,
        layer_type: LayerType | str = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> list[int]:
        """Ids, counted from 0 among layers of the type, of one stage's. Arguments as in `get_num_layers_to_build`."""
        first = self.get_layer_offset(layer_type, vp_stage, pp_rank)
        return list(range(first, first + self.get_num_layers_to_build(layer_type, vp_stage, pp_rank)))

    def validate_layer_layout(self, num_layers: int, mtp_num_layers: int | None) -> bool:
        """Check that the layout fits a model.

        Args:
            num_layers: Decoder layers of the model.
            mtp_num_layers: Multi-token-prediction layers of the model; None is none.

        Returns:
            Whether MTP is standalone: some MTP layer is in another stage than the loss.

        Raises:
            LayoutError: It does not fit. The message lists every violation.
        """
        wanted = {
            LayerType.decoder: _whole("num_layers", num_layers, at_least=0),
            LayerType.mtp: _whole("mtp_num_layers", 0 if mtp_num_layers is None else mtp_num_layers, at_least=0),
        }
        if violations := [*self._miscounted(wanted), *self._misplaced()]:
            given = _cut(str(self))
            raise LayoutError(f"The layout {given} does not fit the model:" + "".join(f"\n  - {v}" for v in violations))
        return any("m" in stage and "L" not in stage for stage in self._stages)

    def pretty_repr(self) -> str:
        """A table of the layers: a row for each run of equal pipeline ranks, a column for each virtual stage.

        The layout ``Et*3|(tt|)*29,m|L`` on 16 ranks::

                                VPP rank 0                 VPP rank 1
            PP rank 0           embedding,decoder*3        decoder*2
            PP rank 1-13        decoder*2                  decoder*2
            PP rank 14          decoder*2                  mtp
            PP rank 15          decoder*2                  loss
        """
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        rows = [("", *(f"VPP rank {i}" for i in range(vpp)))]
        for stages, ranks in groupby(range(pp), key=lambda rank: self._stages[rank::pp]):
            first, *rest = ranks
            name = f"PP rank {first}-{rest[-1]}" if rest else f"PP rank {first}"
            rows.append((name, *map(_cell, stages)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        gap = " " * (8 if vpp <= 4 else 4)
        lines = (gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self._shortest

    def __repr__(self) -> str:
        return f"PipelineParallelLayerLayout({self._given}, {self.pipeline_model_parallel_size})"

    @cached_property
    def _shortest(self) -> str:
        return shorten(self._expanded)

    @cached_property
    def _stages(self) -> list[str]:
        """The symbols of each stage."""
        return self._expanded.split("|")

    @cached_property
    def _offsets(self) -> dict[str, list[int]]:
        """By symbol: the number of such layers before each stage."""
        counts = {symbol: [stage.count(symbol) for stage in self._stages] for symbol in _OF_SYMBOL}
        return {symbol: list(accumulate(count, initial=0)) for symbol, count in counts.items()}

    def _stage(self, vp_stage: int | None, pp_rank: int | None) -> int:
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        if pp_rank is None:
            pp_rank = _pipeline_rank() if _pipeline_rank else None
        if pp_rank is None:
            raise LayoutError(
                "`pp_rank` is needed while the parallel groups are not initialized: pass it, or call "
                "partita.torch.init_parallelism() first"
            )
        if vp_stage is None and vpp > 1:
            raise LayoutError(f"`vp_stage` is needed, since each pipeline rank has {vpp} stages: pass 0 to {vpp - 1}")
        vp_stage = _whole("vp_stage", 0 if vp_stage is None else vp_stage, at_least=0, below=vpp)
        return vp_stage * pp + _whole("pp_rank", pp_rank, at_least=0, below=pp)

    def _where(self, at: int) -> str:
        """The stage of character `at` of the expanded text, in words."""
        stage = self._expanded.count("|", 0, at)
        vp_stage, pp_rank = divmod(stage, self.pipeline_model_parallel_size)
        return f"stage {stage} (PP rank {pp_rank}, VPP rank {vp_stage})"

    def _miscounted(self, wanted: dict[LayerType, int]) -> Iterable[str]:
        for kind, expected in ({LayerType.embedding: 1} | wanted | {LayerType.loss: 1}).items():
            found = self._expanded.count(kind.value)
            if found != expected:
                fix = f"add {expected - found}" if found < expected else f"remove {found - expected}"
                yield f"{kind.name} ({kind.value}): {expected} expected, {found} found; {fix}"

    def _misplaced(self) -> Iterable[str]:
        text = self._expanded
        layers = text.replace("|", "")
        if "E" in layers[1:]:
            yield f"the embedding (E) must be the first layer, but one is later, in {self._where(text.rindex('E'))}"
        if "L" in layers[:-1]:
            yield f"the loss (L) must be the last layer, but one is earlier, in {self._where(text.index('L'))}"
        if "m" in text and text.index("m") < text.rfind("t"):
            first, last = self._where(text.index("m")), self._where(text.rindex("t"))
            yield f"mtp layers (m) must follow every decoder layer (t), but one in {first} precedes one in {last}"


Layout = PipelineParallelLayerLayout


def _read(layout: object) -> str:
    """The symbols of every stage, joined by ``|``."""
    if isinstance(layout, str):
        return expand(layout)
    if not isinstance(layout, (list, tuple)):
        raise LayoutError(f"`layout` must be a text or a list with one item for each stage, but is {_type(layout)}")
    if not layout:
        raise LayoutError("`layout` must have at least one stage, but is an empty list: write [[]] for one empty stage")
    stages, size = [], len(layout) - 1
    for i, given in enumerate(layout):
        stages.append(_read_stage(given, f"`layout[{i}]`"))
        size += len(stages[-1])
        if size > MAX_SYMBOLS:
            raise LayoutError(f"`layout` has more than {MAX_SYMBOLS:,} layers and stages")
    return "|".join(stages)


def _read_stage(stage: object, name: str) -> str:
    if isinstance(stage, (list, tuple)):
        return "".join([_symbol(layer, name) for layer in stage])
    if not isinstance(stage, str):
        raise LayoutError(f"{name} must be one stage, a list of layers or a text such as 'Ettt', but is {_type(stage)}")
    if stage.strip().lower() in LayerType.__members__:
        raise LayoutError(f"{name} must be one stage, but is a layer: write [{_cut(stage)}] for a stage of it alone")
    try:
        symbols = expand(stage)
    except LayoutError as error:
        raise LayoutError(f"{name}: {error}") from None
    if "|" in symbols:
        raise LayoutError(f"{name} must be one stage, but {_cut(stage)} has `|`: give each stage an item of its own")
    return symbols


def _symbol(layer: object, name: str) -> str:
    """The symbol of a layer type, given as itself, Megatron-LM's enum of the same names, full name or symbol."""
    if isinstance(layer, LayerType):
        return layer.value
    if not isinstance(layer, (str, Enum)):
        raise LayoutError(f"{name}: a layer must be a LayerType, a name or a symbol, but is {_type(layer)}")
    word = layer.name if isinstance(layer, Enum) else layer.strip()
    if word in _OF_SYMBOL:
        return word
    if word.lower() in LayerType.__members__:
        return LayerType[word.lower()].value
    known = ", ".join(f"{kind.name} ({kind.value})" for kind in LayerType)
    raise LayoutError(f"{name}: a layer must be one of {known}, but is {_cut(word)}")


def _uneven(expanded: str, num_stages: int, pp: int) -> str:
    divisors = {d for k in range(1, math.isqrt(num_stages) + 1) if num_stages % k == 0 for d in (k, num_stages // k)}
    remove = f"remove {num_stages % pp}, " if num_stages > pp else ""
    problem = (
        f"The number of stages must be a multiple of `pipeline_model_parallel_size` ({_number(pp)}), "
        f"but is {num_stages} instead: add {_number(-num_stages % pp)} (a stage may be empty), {remove}"
        f"or use a `pipeline_model_parallel_size` of {max(d for d in divisors if d < pp)}"
    )
    if expanded.endswith("|"):
        problem += ". The last stage is empty, because `|` ends the layout: leave it out if you want no empty stage"
    return problem


def _cell(stage: str) -> str:
    runs = [(_OF_SYMBOL[symbol].name, len(list(run))) for symbol, run in groupby(stage)]
    return ",".join(name if length == 1 else f"{name}*{length}" for name, length in runs) or "(empty stage)"


def _text(layout: object) -> str:
    if not isinstance(layout, str):
        raise LayoutError(f"`layout` must be a text here, but is {_type(layout)}")
    return layout


def _whole(name: str, value: object, at_least: int, below: int | None = None) -> int:
    rule = f"at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise LayoutError(f"`{name}` must be a whole number, {rule}, but is {_type(value)}")
    if value < at_least or (below is not None and value >= below):
        raise LayoutError(f"`{name}` must be {rule}, but is {_number(value)} instead")
    return value


def _number(value: int) -> str:
    # Python refuses to print integers of more than 4300 digits.
    return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"


def _type(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _cut(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:60] + "...")
