"""Hardware: devices, the links between them, and how much of their peak they reach; read from TOML files.

A file names one `[device]` that all ranks have, or several `[[devices]]` with the number of ranks that each one has. Links have
classes: `shared` (memory that ranks of one machine share), `node` (between the devices of a machine) and `network` (between
machines). docs/planning.md describes every key.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partita.core.model.spec import DTYPE_BYTES
from partita.errors import PlanError
from partita.user_cache import cache_folder

Curve = tuple[tuple[float, float], ...]
"""Points (size, value) in ascending order; between two, values are interpolated over the logarithm of the size."""

LINK_CLASSES = ("shared", "node", "network")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
_SUFFIX = ".toml"
ALIASES = MappingProxyType(
    {
        "a100": "a100-80gb", "h100-80gb": "h100", "h200-141gb": "h200", "b200-192gb": "b200", "mi300x-192gb": "mi300x",
        "m2-max-96gb": "m2-max", "m2-ultra-192gb": "m2-ultra", "m3-max-128gb": "m3-max", "m3-ultra-512gb": "m3-ultra",
        "m4-max-128gb": "m4-max",
    }
)  # fmt: skip
"""Other names of packaged files, mostly with the size of the memory."""


def value_at(curve: Curve, size: float) -> float:
    """The value of a curve at a size; outside its points that of the nearest."""
    if len(curve) == 1 or size <= curve[0][0]:
        return curve[0][1]
    if size >= curve[-1][0]:
        return curve[-1][1]
    index = bisect_right(curve, (size, math.inf))
    (low, first), (high, second) = curve[index - 1], curve[index]
    return first + (second - first) * math.log(size / low) / math.log(high / low)


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """What one rank computes with.

    Attributes:
        name: Its name.
        memory_bytes: Its memory.
        memory_bandwidth: Bytes per second between memory and processor.
        peak_flops: Operations per second of dense matrix products by dtype.
        product_efficiency: By the operations of a matrix product, the share of the peak that it reaches.
        narrow_efficiency: By the smallest dimension of a product, a factor of that share.
        attention_efficiency: By the operations of an attention, the share of the peak that a fused kernel reaches.
        memory_efficiency: By the bytes that an operation moves, the share of the bandwidth that it reaches; above 1 in caches.
        vector_efficiency: The same for the weights of a product with few rows, as in decoding; without, that of any memory.
        others_share: The share of that bandwidth that norms, activations and positions reach, where computing limits them.
        others_backward_share: The same of their backward.
        optimizer_share: The same of a step of the optimizer.
        unpack_flops: Quantized weights: elements per second that are unpacked, 0 if unpacking costs nothing.
        operation_s: Seconds to start an operation.
        layer_s: Seconds of a layer's forward that no operation accounts for (Python, dispatch).
        layer_backward_s: The same of its backward.
        decode_layer_s: The same of a decoded token.
        update_layer_s: Seconds of a layer's part of the optimizer's step (norms, loops over tensors) beside its bytes.
        microbatch_s: Seconds of a micro-batch that no layer accounts for.
        step_s: Seconds of a training step that no micro-batch accounts for.
        token_s: Seconds of a decoded token that no layer accounts for (the choice of the token, the loop).
        is_asynchronous: Whether the fixed costs run beside the operations, as where a GPU works through a queue.
        reserved_bytes: Memory that the framework and its libraries take.
        price_per_hour: The price of an hour, in any currency; 0 if unknown.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    product_efficiency: Curve = ((1.0, 1.0),)
    narrow_efficiency: Curve = ((1.0, 1.0),)
    attention_efficiency: Curve = ((1.0, 0.5),)
    memory_efficiency: Curve = ((1.0, 0.8),)
    vector_efficiency: Curve = ()
    others_share: float = 1.0
    others_backward_share: float = 1.0
    optimizer_share: float = 1.0
    unpack_flops: float = 0.0
    operation_s: float = 0.0
    layer_s: float = 0.0
    layer_backward_s: float = 0.0
    decode_layer_s: float = 0.0
    update_layer_s: float = 0.0
    microbatch_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0
    is_asynchronous: bool = True
    reserved_bytes: int = 0
    price_per_hour: float = 0.0

    def peak(self, dtype: str) -> float:
        """The peak of products in `dtype`; the one of the next wider dtype if the device has none of its own."""
        for name in (dtype, *_WIDER.get(dtype, ()), "float32"):
            if name in self.peak_flops:
                return self.peak_flops[name]
        return max(self.peak_flops.values())


_WIDER = {
    "bfloat16": ("float16",), "float16": ("bfloat16",), "float8_e4m3fn": ("bfloat16", "float16"),
    "float8_e5m2": ("float8_e4m3fn", "bfloat16", "float16"), "int8": ("float8_e4m3fn", "bfloat16", "float16"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Link:
    """What ranks communicate through.

    Attributes:
        name: Its class.
        latency_s: Seconds of a message without bytes.
        bandwidth: Bytes per second that one device sends while it receives as many.
        algorithms: The algorithms of reductions: `ring`, `tree`.
        efficiency: By the bytes of a message, the share of the bandwidth that it reaches.
        measured: By the name of a collective, its seconds by bytes between two ranks; it replaces latency and bandwidth.
        occupies: The share of a collective's time that its rank cannot compute in, also where the two overlap.
    """

    name: str
    latency_s: float
    bandwidth: float
    algorithms: tuple[str, ...] = ("ring", "tree")
    efficiency: Curve = ((1.0, 1.0),)
    measured: Mapping[str, Curve] = field(default_factory=dict)
    occupies: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Hardware:
    """The devices of all ranks, and the links between them.

    Attributes:
        name: Its name.
        devices: One device that every rank has, or that of each rank in order.
        devices_per_node: Neighbouring ranks on one machine.
        links: Links by class.
        kernels: The name of the kernels that compute a layer; see `partita.cost.kernels`.
        backends: By the name of a backend, the link between ranks of one machine over it; `links` has that of the default one.
        source: Where the numbers come from.
    """

    name: str
    devices: tuple[Device, ...]
    devices_per_node: int
    links: Mapping[str, Link]
    kernels: str = "fused"
    backends: Mapping[str, Link] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def read(cls, name_or_path: str | os.PathLike[str]) -> Hardware:
        """The hardware of a packaged file, by its name or alias, of this machine (`this`) as it was measured, or of any file.

        Raises:
            PlanError: There is no such file, or it is malformed.
        """
        if isinstance(name_or_path, str):
            name = ALIASES.get(name_or_path.lower(), name_or_path.lower())
            if name in names():
                return _packaged(name)
        path = measured_file() if name_or_path == "this" else Path(name_or_path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise PlanError(
                f"hardware must be one of {', '.join(sorted((*names(), *ALIASES)))}, or a TOML file, but "
                f"{str(name_or_path)!r} is neither. "
                "`partita measure` writes a file for this machine."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the hardware file {path} cannot be read: {error}.") from error
        return parse(text, str(path))

    def device(self, rank: int) -> Device:
        """The device of a rank."""
        return self.devices[rank] if len(self.devices) > 1 else self.devices[0]

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every rank has the same device."""
        return all(device is self.devices[0] for device in self.devices)

    def with_memory(self, memory_bytes: int) -> Hardware:
        """The same hardware whose devices have `memory_bytes` each."""
        if type(memory_bytes) is not int or memory_bytes < 1:
            raise PlanError(f"memory_bytes must be a whole number of at least 1, but is {memory_bytes!r}.")
        reserved = max(device.reserved_bytes for device in self.devices)
        if memory_bytes <= reserved:
            raise PlanError(
                f"the memory of a device must exceed the {reserved:,} bytes that libraries take on {self.name}, but is "
                f"{memory_bytes:,}. Use more, or a hardware file with fewer reserved_bytes."
            )
        return self._with_devices(memory_bytes=memory_bytes)

    def with_kernels(self, kernels: str) -> Hardware:
        """The same hardware with other kernels."""
        return replace(self, kernels=kernels)

    def with_backend(self, backend: str) -> Hardware:
        """The same hardware whose ranks of one machine communicate over another backend that was measured."""
        if backend not in self.backends:
            known = ", ".join(self.backends) or "none: the file has no [backends]"
            raise PlanError(f"backend must be one of those of {self.name} ({known}), but is {backend!r}.")
        return replace(self, links=MappingProxyType({**self.links, "shared": self.backends[backend]}))

    def _with_devices(self, **changed: Any) -> Hardware:
        new = {id(device): replace(device, **changed) for device in self.devices}
        return replace(self, devices=tuple(new[id(device)] for device in self.devices))

    def for_ranks(self, count: int) -> Hardware:
        """The same machine for `count` ranks.

        Raises:
            PlanError: The file fixes the devices of fewer ranks.
        """
        if len(self.devices) == 1 or len(self.devices) == count:
            return self
        if count > len(self.devices):
            raise PlanError(
                f"{self.name} has the devices of {len(self.devices)} ranks, but {count} are needed. Use at most "
                f"{len(self.devices)} ranks, or add [[devices]] to the file."
            )
        return replace(self, devices=self.devices[:count])

    def group(self, stride: int, size: int, ranks: int) -> Group:
        """The group of `size` ranks that are `stride` apart, of a run with `ranks` ranks."""
        here = self.devices_per_node
        whole = stride * size
        inside = ranks <= here or (whole <= here and here % whole == 0)
        return Group(size, size if inside else max(1, min(size, here // stride)))

    def link_inside(self) -> Link:
        """The link between the ranks of one machine."""
        return self.links.get("node") or self.links.get("shared") or self.links["network"]

    def link_between(self) -> Link:
        """The link between machines."""
        return self.links.get("network") or self.link_inside()


@dataclass(frozen=True)
class Group:
    """The size of a group of ranks, and how many of them are on one machine."""

    size: int
    per_node: int

    @property
    def is_inside(self) -> bool:
        """Whether all of its ranks are on one machine."""
        return self.per_node >= self.size


def measured_file() -> Path:
    """Where `partita measure` writes what it finds of this machine."""
    return cache_folder() / "hardware.toml"


@cache
def names() -> tuple[str, ...]:
    """The names of the packaged hardware files."""
    folder = resources.files("partita.cost").joinpath("machines")
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in folder.iterdir() if file.name.endswith(_SUFFIX)))


@cache
def _packaged(name: str) -> Hardware:
    file = resources.files("partita.cost").joinpath("machines", name + _SUFFIX)
    return parse(file.read_text(encoding="utf-8"), name)


def parse(text: str, origin: str) -> Hardware:
    """The hardware that the text of a TOML file describes; `origin` names the file in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"the hardware file {origin} is not TOML: {error}.") from error
    return _Reader(origin).hardware(data)


def write(data: Mapping[str, Any], comment: str = "") -> str:
    """The text of a TOML file with nested tables of numbers, texts, truths and lists."""
    lines = [f"# {line}" for line in comment.splitlines()]

    def table(path: str, values: Mapping[str, Any]) -> None:
        if path:
            lines.extend(("", f"[{path}]"))
        inner = {key: value for key, value in values.items() if isinstance(value, Mapping)}
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in inner)
        for key, value in inner.items():
            table(f"{path}.{key}" if path else key, value)

    table("", data)
    return "\n".join(lines) + "\n"


class _Reader:
    """Reads the tables of a file; an error names the file and the key."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def hardware(self, data: Mapping[str, Any]) -> Hardware:
        self._known(
            data, "", ("name", "source", "devices_per_node", "kernels", "device", "devices", "links", "backends")
        )
        if ("device" in data) == ("devices" in data):
            raise self._error("device", "it needs one [device] for all ranks, or [[devices]] with a count each")
        one = data.get("device")
        devices = (self._device(one, "device"),) if one is not None else tuple(self._devices(data["devices"]))
        links = self._table(data, "", "links")
        self._known(links, "links.", LINK_CLASSES)
        if not links:
            raise self._error(
                "links", f"it needs at least one of {', '.join(f'[links.{name}]' for name in LINK_CLASSES)}"
            )
        return Hardware(
            name=str(data.get("name") or self.origin),
            devices=devices,
            devices_per_node=self._count(data, "", "devices_per_node", 1),
            links=MappingProxyType({name: self._link(name, links[name]) for name in links}),
            kernels=str(data.get("kernels", "fused")),
            backends=MappingProxyType(
                {name: self._link(name, one, "backends") for name, one in self._table(data, "", "backends").items()}
            ),
            source=str(data.get("source", "")),
        )

    def _devices(self, tables: Any) -> Iterator[Device]:
        if not isinstance(tables, list) or not tables:
            raise self._error("devices", "it must be a list of tables")
        for table in tables:
            device = self._device({k: v for k, v in table.items() if k != "count"}, "devices")
            yield from [device] * self._count(table, "devices.", "count", 1)

    def _device(self, table: Any, where: str) -> Device:
        if not isinstance(table, Mapping):
            raise self._error(where, "it must be a table")
        self._known(table, f"{where}.", tuple(Device.__dataclass_fields__))
        dot = f"{where}."
        peaks = self._table(table, dot, "peak_flops")
        self._known(peaks, f"{dot}peak_flops.", tuple(DTYPE_BYTES))
        if not peaks:
            raise self._error(f"{dot}peak_flops", "it needs the peak of at least one dtype")
        given: dict[str, Any] = {
            "name": str(table.get("name") or self.origin),
            "memory_bytes": self._count(table, dot, "memory_bytes"),
            "memory_bandwidth": self._number(table, dot, "memory_bandwidth", above=0),
            "peak_flops": MappingProxyType({n: self._number(peaks, f"{dot}peak_flops.", n, above=0) for n in peaks}),
        }
        for key in Device.__dataclass_fields__:
            if key in given or key not in table:
                continue
            if key.endswith("_efficiency"):
                given[key] = self._curve(table[key], dot + key)
            elif key == "is_asynchronous":
                given[key] = bool(table[key])
            elif key == "reserved_bytes":
                given[key] = self._count(table, dot, key, 0, least=0)
            else:
                given[key] = self._number(table, dot, key, 0.0)
        if given.get("reserved_bytes", 0) >= given["memory_bytes"]:
            raise self._error(
                f"{dot}reserved_bytes",
                f"it must be below memory_bytes ({given['memory_bytes']:,}), but is {given['reserved_bytes']:,}",
            )
        return Device(**given)

    def _link(self, name: str, table: Any, where: str = "links") -> Link:
        dot = f"{where}.{name}."
        if not isinstance(table, Mapping):
            raise self._error(dot[:-1], "it must be a table")
        self._known(table, dot, tuple(key for key in Link.__dataclass_fields__ if key != "name"))
        algorithms = tuple(table.get("algorithms", ("ring", "tree")))
        if not algorithms or any(one not in ("ring", "tree") for one in algorithms):
            raise self._error(f"{dot}algorithms", f"it must be a list of ring and tree, but is {algorithms!r}")
        measured = self._table(table, dot, "measured")
        self._known(measured, f"{dot}measured.", COLLECTIVES)
        return Link(
            name=name,
            latency_s=self._number(table, dot, "latency_s"),
            bandwidth=self._number(table, dot, "bandwidth", above=0),
            algorithms=algorithms,
            efficiency=self._curve(table["efficiency"], f"{dot}efficiency") if "efficiency" in table else ((1.0, 1.0),),
            measured=MappingProxyType({k: self._curve(v, f"{dot}measured.{k}") for k, v in measured.items()}),
            occupies=self._number(table, dot, "occupies", 0.0),
        )

    def _table(self, data: Mapping[str, Any], dot: str, key: str) -> Mapping[str, Any]:
        table = data.get(key, {})
        if not isinstance(table, Mapping):
            raise self._error(dot + key, f"it must be a table, but is {table!r:.60}")
        return table

    def _known(self, table: Mapping[str, Any], dot: str, known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                raise self._error(dot + key, f"this key is unknown; known are {', '.join(known)}")

    def _number(
        self, table: Mapping[str, Any], dot: str, key: str, default: float | None = None, above: float | None = None
    ) -> float:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf or value == above:
            least = "above 0" if above is not None else "of at least 0"
            raise self._error(dot + key, f"it must be a number {least}, but is {value!r:.60}")
        return float(value)

    def _count(self, table: Mapping[str, Any], dot: str, key: str, default: int | None = None, least: int = 1) -> int:
        value = table.get(key, default)
        if type(value) is not int or value < least:
            raise self._error(dot + key, f"it must be a whole number of at least {least}, but is {value!r:.60}")
        return value

    def _curve(self, points: Any, key: str) -> Curve:
        try:
            curve = tuple((float(size), float(value)) for size, value in points)
        except (TypeError, ValueError):
            curve = ()
        sizes = [size for size, _ in curve]
        if (
            not curve
            or sizes != sorted(set(sizes))
            or min(sizes) <= 0
            or any(not 0 < value < math.inf for _, value in curve)
        ):
            raise self._error(
                key, f"it must be a list of [size, value], all above 0 and sizes ascending, but is {points!r:.60}"
            )
        return curve

    def _error(self, key: str, why: str) -> PlanError:
        return PlanError(f"the hardware file {self.origin} is malformed at {key}: {why}.")
