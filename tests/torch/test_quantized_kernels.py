"""Products with quantized weights: equal to those of the weights that the definition of each form gives, on every CPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from partita.torch.quantized import native
from partita.torch.quantized.kernels import FEW, Kernel, kernel_for

Parts = dict[str, Tensor]
LEVELS = ["AVX512", "AVX2", "DEFAULT"]
BEST = torch.backends.cpu.get_cpu_capability()
HERE = LEVELS[LEVELS.index(BEST) :] if BEST in LEVELS else LEVELS[-1:]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUM_ERROR = 1e-6
"""Of a sum's terms without their signs, for up to 768 terms in float32."""
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of an output or a weight that is rounded once to a narrower dtype."""


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set that this CPU has, and the one that every CPU has."""
    if request.param not in HERE:
        pytest.skip(f"this CPU has {BEST}, not {request.param}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_the_definitions_here_are_those_of_ggml() -> None:
    for form in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"):
        parts, weight = made(form, 5, 512)
        theirs = gguf.quants.dequantize(parts["blocks"].numpy(), getattr(gguf.GGMLQuantizationType, form))
        assert torch.equal(weight.float(), torch.from_numpy(theirs)), form


@pytest.mark.parametrize(
    "form", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "int4", "int4-symmetric", "nf4", "fp8", "fp8-row"]
)
def test_rows_and_products_are_those_of_the_definition(form: str, level: str, threads: int) -> None:
    # A prime number of rows, of which the last are not decoded together; the larger weight is multiplied by several threads.
    for out, in_ in ((1, 256), (37, 768), (521, 512)):
        parts, weight = made(form, out, in_)
        kernel = needed(form, parts, (out, in_))
        assert torch.equal(kernel.rows(0, out), weight.float())
        assert torch.equal(kernel.rows(out // 2, out - out // 3), weight.float()[out // 2 : out - out // 3])
        for dtype in DTYPES:
            for rows in (1, 2, 3, 7, 8, 13, FEW[dtype], FEW[dtype] + 3):
                check(kernel, weight, torch.randn(rows, in_).to(dtype))


def check(kernel: Kernel, weight: Tensor, x: Tensor) -> None:
    want, terms = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    got = kernel(x)
    assert (got.dtype, got.shape) == (x.dtype, want.shape)
    rounded = (
        x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] > FEW[x.dtype]
    )  # the weights too, as torch multiplies
    bound = (
        (SUM_ERROR + ROUNDING[x.dtype] * rounded) * terms
        + ROUNDING[x.dtype] * want.abs()
        + 2**-25
        * (
            x.dtype == torch.float16  # half the distance of subnormal ones
        )
    )
    excess = ((got.double() - want).abs() / bound).max()
    assert excess <= 1, f"{x.shape[:-1]} rows in {x.dtype} differ by {excess:.3f} times the rounding that is allowed"


def test_inputs_of_any_shape_and_memory_layout() -> None:
    parts, weight = made("Q4_1", 40, 64)
    kernel = needed("Q4_1", parts, (40, 64))
    x = torch.randn(64, 3, 2)
    check(kernel, weight, x.permute(2, 1, 0))
    assert kernel(torch.empty(2, 0, 64)).shape == (2, 0, 40)
    assert kernel(torch.randn(64, requires_grad=True)).shape == (40,)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 32), torch.ones(2, 64, dtype=torch.float64), torch.ones(2, 64, device="meta")]
)
def test_an_input_that_does_not_fit_is_an_error(x: Tensor) -> None:
    kernel = needed("Q4_1", made("Q4_1", 40, 64)[0], (40, 64))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\] in float32, bfloat16 or float16 on the CPU; got"):
        kernel(x)
    with pytest.raises(IndexError, match="within 0 to 40; got 39 to 41"):
        kernel.rows(39, 41)


def test_a_scale_of_zero_and_the_smallest_half_are_exact() -> None:
    parts, _ = made("Q4_1", 3, 64)
    tiny = torch.tensor([[0, 0], [2**-24, -(2**-24)], [65504, -65504]], dtype=torch.float16)
    parts["blocks"].view(3, 2, 20)[..., :4] = tiny.view(torch.uint8).unsqueeze(1)
    kernel, weight = needed("Q4_1", parts, (3, 64)), q4_1(parts, (3, 64))
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(kernel.rows(0, 3), weight.float())
    finally:
        torch.set_flush_denormal(False)


def test_every_float8_is_exact(level: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.isnan()].float().sort().values[:224].to(torch.float8_e4m3fn).view(7, 32)
    kernel = needed("fp8", {"codes": codes, "scales": torch.ones(1, 1)}, (7, 32))
    assert torch.equal(kernel.rows(0, 7), codes.float())


def test_a_packed_weight_takes_no_more_memory_than_its_codes_and_scales() -> None:
    for form, bits in {"Q4_1": 5, "Q8_0": 8.5, "Q4_K": 4.5, "Q6_K": 6.5625, "int4": 4.75, "nf4": 4.5, "fp8": 8}.items():
        assert needed(form, made(form, 256, 512)[0], (256, 512)).nbytes <= 256 * 512 * bits / 8 * 1.01, form


def test_copies_and_moved_memory_are_followed() -> None:
    parts, weight = made("Q4_0", 9, 64)
    kernel = needed("Q4_0", parts, (9, 64))
    other, through_bytes = copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))
    parts["blocks"].share_memory_()  # type: ignore[no-untyped-call]
    assert torch.equal(kernel.rows(0, 9), weight.float())
    parts["blocks"].zero_()
    assert not kernel.rows(0, 9).any()
    for each in (other, through_bytes):
        assert torch.equal(each.rows(0, 9), weight.float())


def test_in_inference_mode_and_compiled() -> None:
    parts, weight = made("Q4_1", 40, 64)
    kernel, x = needed("Q4_1", parts, (40, 64)), torch.randn(2, 64)
    with torch.inference_mode():
        check(kernel, weight, x)
        check(kernel, weight, torch.randn(FEW[torch.float32] + 1, 64))
    compiled: Callable[[Tensor], Tensor] = torch.compile(lambda x: kernel(x * 2) + 1, backend="eager")
    assert torch.equal(compiled(x), kernel(x * 2) + 1)


@pytest.mark.parametrize(
    ("form", "change", "shape", "dtype"),
    [
        ("Q3_K", {}, (8, 64), torch.float32),
        ("Q4_1", {}, (8, 64), torch.float64),
        ("Q4_1", {}, (8, 96), torch.float32),
        ("Q4_K", {}, (8, 64), torch.float32),
        ("Q4_1", {"blocks": torch.zeros(8, 40, dtype=torch.int8)}, (8, 64), torch.float32),
        ("Q4_1", {"blocks": torch.zeros(8, 40, dtype=torch.uint8, device="meta")}, (8, 64), torch.float32),
        ("int4", {"scales": torch.ones(8, 4)}, (8, 64), torch.float32),
        ("int4", {"zeros": torch.zeros(8, 2)}, (8, 64), torch.float32),
        ("nf4", {"table": torch.ones(15)}, (8, 64), torch.float32),
        ("fp8", {"codes": torch.full((8, 64), torch.nan).to(torch.float8_e4m3fn)}, (8, 64), torch.float32),
        ("fp8", {"scales": torch.ones(2, 1)}, (8, 64), torch.float32),
    ],
)
def test_what_has_no_kernel_gets_none(form: str, change: Parts, shape: tuple[int, int], dtype: torch.dtype) -> None:
    known = form if form in MAKERS and shape[1] == 64 and form != "Q4_K" else "Q4_1"
    parts = {**made(known, 8, 64)[0], **change}
    assert kernel_for(form, parts, shape, dtype) is None


@pytest.mark.fresh
def test_threads_are_those_of_torch() -> None:
    printed = alone("""
        torch.set_num_threads(1)
        kernel = needed("Q8_0", made("Q8_0", 4096, 512)[0], (4096, 512))
        torch.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        kernel(torch.ones(1, 512))
        print(len(os.listdir("/proc/self/task")) - before)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        print(len(os.listdir("/proc/self/task")) - before)
    """)
    assert printed.split() == ["2", "2"], "ours and torch's products share the same two threads beside the main one"


@pytest.mark.fresh
def test_a_forked_process_multiplies_after_its_parent_used_threads() -> None:
    printed = alone("""
        kernel, x = needed("Q8_0", made("Q8_0", 4096, 512)[0], (4096, 512)), torch.randn(1, 512)
        torch.set_num_threads(2)
        expected = kernel(x)
        if os.fork() == 0:
            print(torch.equal(kernel(x), expected), flush=True)
            os._exit(0)
        print(os.wait()[1])
    """)
    assert printed.split() == ["True", "0"]


@pytest.mark.fresh
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho used >> {tmp_path}/uses\nexec c++ -O0 "$@"\n')
    compiler.chmod(0o755)
    settings = {"PARTITA_CACHE": str(tmp_path / "cache"), "CXX": str(compiler)}
    processes = [started('print(native.library() is not None, "kernel")', settings) for _ in range(2)]
    assert [process.communicate()[0].split() for process in processes] == [["True", "kernel"]] * 2
    assert (tmp_path / "uses").read_text().split() == ["used"]
    assert [file.suffix for file in sorted((tmp_path / "cache" / "native").iterdir())] == [".lock", ".so"]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/nowhere/c++", "the compiler '/nowhere/c++' that CXX names was not found. Correct or unset CXX."),
        ("false", "false failed: exit code 1. Set CXX to another C++ compiler (GCC 10 or Clang 15, or newer)."),
        ("c++ -include /nowhere/missing.h", "missing.h: No such file or directory"),
        (None, "no C++ compiler was found. Install one (on Debian `apt-get install g++`"),
    ],
)
def test_without_a_working_compiler_a_note_says_what_to_do(
    compiler: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    if compiler is None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", compiler)
    notes = notes_of_two_kernels(caplog)
    assert len(notes) == 1
    assert notes[0].startswith("Decoding and products with quantized weights are slow: ")
    assert said in notes[0]


def test_a_cache_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "file"))
    (note,) = notes_of_two_kernels(caplog)
    assert "Set PARTITA_CACHE to a folder" in note


def notes_of_two_kernels(caplog: pytest.LogCaptureFixture) -> list[str]:
    native.library.cache_clear()
    try:
        for _ in range(2):
            assert kernel_for("Q4_1", made("Q4_1", 8, 64)[0], (8, 64), torch.float32) is None
    finally:
        native.library.cache_clear()
    return [record.getMessage() for record in caplog.records]


def started(code: str, settings: dict[str, str]) -> subprocess.Popen[str]:
    """A process that runs `code` with what this module defines."""
    first = f"import os, torch\nfrom {__name__} import *\nfrom {__name__} import native\n"
    return subprocess.Popen(
        [sys.executable, "-c", first + textwrap.dedent(code)],
        env={**os.environ, **settings},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


def alone(code: str) -> str:
    process = started(code, {})
    with process:
        try:
            printed = process.communicate(timeout=100)[0]
        finally:
            process.kill()
    assert process.returncode == 0
    return printed


def needed(form: str, parts: Parts, shape: tuple[int, int]) -> Kernel:
    kernel = kernel_for(form.split("-")[0], parts, shape, torch.float32)
    assert kernel is not None, "these tests need a C++ compiler"
    return kernel


def made(form: str, out: int, in_: int) -> tuple[Parts, Tensor]:
    """Random parts of a weight and, in float64, the weight that they define."""
    torch.manual_seed(out * in_)
    return MAKERS[form](out, in_)


def blocks(count: int, bytes_of_block: int, halves: list[int], out: int) -> Tensor:
    """Random bytes of `count` blocks a row, with numbers near 0.01 where a block has halves."""
    made = torch.randint(0, 256, (out, count, bytes_of_block), dtype=torch.uint8)
    for at in halves:
        made[..., at : at + 2] = (torch.randn(out, count, 1) * 0.01).half().view(torch.uint8)
    return made.view(out, -1)


def half(block: Tensor, at: int) -> Tensor:
    return block[..., at : at + 2].contiguous().view(torch.float16).double()


def halves_of_bytes(codes: Tensor) -> Tensor:
    """All low nibbles, then all high ones."""
    return torch.cat((codes & 15, codes >> 4), -1).double()


def q4_0(parts: Parts, shape: tuple[int, int]) -> Tensor:
    block = parts["blocks"].view(shape[0], -1, 18)
    return ((halves_of_bytes(block[..., 2:]) - 8) * half(block, 0)).view(shape)


def q4_1(parts: Parts, shape: tuple[int, int]) -> Tensor:
    block = parts["blocks"].view(shape[0], -1, 20)
    return (halves_of_bytes(block[..., 4:]) * half(block, 0) + half(block, 2)).view(shape)


def q8_0(parts: Parts, shape: tuple[int, int]) -> Tensor:
    block = parts["blocks"].view(shape[0], -1, 34)
    return (block[..., 2:].view(torch.int8).double() * half(block, 0)).view(shape)


def q4_k(parts: Parts, shape: tuple[int, int]) -> Tensor:
    block = parts["blocks"].view(shape[0], -1, 144)
    packed = block[..., 4:16]
    low, high, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((low & 63, last & 15 | low >> 6 << 4), -1).double() * half(block, 0)
    minima = torch.cat((high & 63, last >> 4 | high >> 6 << 4), -1).double() * half(block, 2)
    codes = block[..., 16:].view(*block.shape[:2], 4, 32)
    codes = torch.stack((codes & 15, codes >> 4), 3).view(*block.shape[:2], 8, 32).double()
    return (codes * scales.unsqueeze(-1) - minima.unsqueeze(-1)).view(shape)


def q6_k(parts: Parts, shape: tuple[int, int]) -> Tensor:
    block = parts["blocks"].view(shape[0], -1, 210)
    low = block[..., :128].view(*block.shape[:2], 2, 64)
    high = block[..., 128:192].view(*block.shape[:2], 2, 1, 32)
    codes = torch.cat((low & 15, low >> 4), -1).view(*block.shape[:2], 2, 4, 32)
    codes = codes | (high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1) & 3) << 4
    scales = block[..., 192:208].view(torch.int8).double() * half(block, 208)
    return ((codes.view(*block.shape[:2], 16, 16).double() - 32) * scales.unsqueeze(-1)).view(shape)


def ggml(
    bytes_of_block: int, weights: int, halves: list[int], defined: Callable[[Parts, tuple[int, int]], Tensor]
) -> Maker:
    def make(out: int, in_: int) -> tuple[Parts, Tensor]:
        parts = {"blocks": blocks(in_ // weights, bytes_of_block, halves, out)}
        return parts, defined(parts, (out, in_))

    return make


def int4(out: int, in_: int) -> tuple[Parts, Tensor]:
    codes = torch.randint(0, 16, (out, in_), dtype=torch.uint8)
    scales = torch.rand(out, in_ // 32).half()
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8)
    grouped = codes.view(out, -1, 32).double() - zeros.unsqueeze(-1)
    return {"codes": codes, "scales": scales, "zeros": zeros}, (grouped * scales.unsqueeze(-1)).view(out, in_)


def int4_symmetric(out: int, in_: int) -> tuple[Parts, Tensor]:
    codes = torch.randint(0, 16, (out, in_), dtype=torch.uint8)
    scales = torch.rand(out, in_ // 128).bfloat16()
    weight = (codes.view(out, -1, 128).double() - 8) * scales.unsqueeze(-1)
    return {"codes": codes, "scales": scales}, weight.view(out, in_)


def nf4(out: int, in_: int) -> tuple[Parts, Tensor]:
    codes = torch.randint(0, 256, (out * in_ // 2, 1), dtype=torch.uint8)
    scales, table = torch.rand(out * in_ // 64), torch.randn(16).sort().values
    values = table[torch.cat((codes >> 4, codes & 15), 1).long()].double()
    return {"codes": codes, "scales": scales, "table": table}, (values.view(-1, 64) * scales.unsqueeze(-1)).view(
        out, in_
    )


def fp8(out: int, in_: int) -> tuple[Parts, Tensor]:
    codes = torch.randn(out, in_).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-out // 128), -(-in_ // 128))
    wide = scales.double().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :in_]
    return {"codes": codes, "scales": scales}, codes.double() * wide


def fp8_row(out: int, in_: int) -> tuple[Parts, Tensor]:
    codes, scales = torch.randn(out, in_).to(torch.float8_e4m3fn), torch.rand(out, 1).bfloat16()
    return {"codes": codes, "scales": scales}, codes.double() * scales


Maker = Callable[[int, int], tuple[Parts, Tensor]]
MAKERS: dict[str, Maker] = {
    "Q4_0": ggml(18, 32, [0], q4_0),
    "Q4_1": ggml(20, 32, [0, 2], q4_1),
    "Q8_0": ggml(34, 32, [0], q8_0),
    "Q4_K": ggml(144, 256, [0, 2], q4_k),
    "Q6_K": ggml(210, 256, [208], q6_k),
    "int4": int4,
    "int4-symmetric": int4_symmetric,
    "nf4": nf4,
    "fp8": fp8,
    "fp8-row": fp8_row,
}
