"""What codecs take in time: ``python -m simulations.benchmarks.wires.codec_time``.

A boundary behind a ReLU, half of it +0, crosses a cut and its gradient comes back, on
one thread. Seconds are those that the thread computed, the least of several times, so
that other work on the machine matters little.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from time import thread_time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_smartsplit.edge.coding.crossing import Crossing
from flwr_smartsplit.types import (
    BFloat16,
    Codec,
    Float16,
    Integer,
    Packed,
    Raw,
    TopK,
    codec_from_text,
)
from flwr_smartsplit.types.options import STEP_OVER_FORWARD

CODECS: tuple[Codec, ...] = (
    *(Raw(), Packed(), Float16(), BFloat16(), Integer(), Integer(bits=4), TopK()),
    *(TopK(random_share=0.1), TopK(values="float16")),
)
MEGABYTE = 1e6
RATES = {"1 Mbit/s": 1e6, "10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "loopback": 1e10}
"""In bits per second. Nothing is sent: 10 Gbit/s is about what loopback carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecTime:
    """Seconds and bytes for each MB of a raw boundary and each MB of its gradient."""

    codec: str
    copy: float  # Of a memory copy, measured in turn with the codec
    code: float
    decode: float
    code_back: float
    decode_back: float
    sent: float  # Bytes on the wire over raw bytes
    back: float

    @property
    def seconds(self) -> float:
        """Of coding and decoding, there and back."""
        return self.code + self.decode + self.code_back + self.decode_back

    def crossing_seconds(self, bits_per_second: float) -> float:
        """Add what a link takes that has one rate in both directions."""
        return self.seconds + 8 * MEGABYTE * (self.sent + self.back) / bits_per_second

    def flops_per_value(self, flops_per_second: float) -> tuple[int, ...]:
        """Say what training does while four bytes are coded, each time."""
        times = self.code, self.decode, self.code_back, self.decode_back
        return tuple(round(4 / MEGABYTE * each * flops_per_second) for each in times)

    def pays_up_to(self, raw: "CodecTime") -> float:
        """Return the bits per second from which on ``Raw`` is as fast."""
        saved = 8 * MEGABYTE * (raw.sent + raw.back - self.sent - self.back)
        extra = self.seconds - raw.seconds
        return saved / extra if extra > 0 else float("inf")


def timed(codec: Codec, boundary: Tensor, gradient: Tensor) -> CodecTime:
    """Let a boundary cross once, and its gradient."""
    near, far = Crossing(codec), Crossing(codec)
    marks = [thread_time()]
    boundary.clone()
    marks.append(thread_time())
    sent = near.encode((boundary,), blocks=(True,))
    marks.append(thread_time())
    far.decode(sent)
    marks.append(thread_time())
    back = far.encode_gradients((gradient,))
    marks.append(thread_time())
    near.decode_gradients(back)
    marks.append(thread_time())
    per_megabyte = MEGABYTE / boundary.nbytes
    spent = [per_megabyte * (end - start) for start, end in pairwise(marks)]
    shares = [each[0].data.size / boundary.nbytes for each in (sent, back)]
    names = "copy code decode code_back decode_back".split()
    return CodecTime(
        codec=str(codec),
        **dict(zip(names, spent, strict=True)),
        sent=shares[0],
        back=shares[1],
    )


def measured(
    codecs: Sequence[Codec], shape: tuple[int, ...], *, repeats: int
) -> list[CodecTime]:
    """Time codecs in turn; return the least of each number: others only add to it."""
    generator = torch.Generator().manual_seed(0)
    boundary = torch.randn(shape, generator=generator).relu()
    gradient = torch.randn(shape, generator=generator)
    seen: dict[Codec, list[CodecTime]] = {codec: [] for codec in codecs}
    for repeat in range(repeats + 1):
        for codec, found in seen.items():
            once = timed(codec, boundary, gradient)
            if repeat:  # The first time warms caches up.
                found.append(once)
    return [least(found) for found in seen.values()]


def least(found: Sequence[CodecTime]) -> CodecTime:
    """Take the least of each number."""
    values = [asdict(each) for each in found]
    numbers = [name for name in values[0] if name != "codec"]
    lowest = {n: min(each[n] for each in values) for n in numbers}
    return CodecTime(codec=found[0].codec, **lowest)


def training_flops_per_second(num_steps: int = 5) -> float:
    """Measure how fast a small convolutional network trains on one thread."""
    model = nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    )
    inputs = torch.randn(16, 32, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    seconds = []
    for _ in range(num_steps + 1):
        begun = thread_time()
        model(inputs).square().mean().backward()
        seconds.append(thread_time() - begun)
    flops = STEP_OVER_FORWARD * counter.get_total_flops()
    return float(flops / min(seconds[1:]))


def show(found: Sequence[CodecTime], flops_per_second: float, console: Console) -> None:
    """Write a table of times, and one of links."""
    copy = min(each.copy for each in found)
    console.print(
        f"\na memory copy of 1 MB takes {1e3 * copy:.3f} ms, and training makes "
        f"{flops_per_second:.2g} FLOP/s; copies that coding takes, of as many bytes"
    )
    parts = "code decode code_back decode_back".split()
    table = Table("codec", *parts, "ms/MB", "sent", "back", "FLOPs a value", box=None)
    for each in found:
        copies = (f"{getattr(each, part) / copy:.1f}" for part in parts)
        sizes = f"{each.sent:.3f}", f"{each.back:.3f}"
        flops = " ".join(map(str, each.flops_per_value(flops_per_second)))
        table.add_row(each.codec, *copies, f"{1e3 * each.seconds:.2f}", *sizes, flops)
    console.print(table)
    console.print("\nms for 1 MB of boundary and its gradient, and up to which rate")
    table = Table("codec", *RATES, "pays up to, Mbit/s", box=None)
    raw = next((each for each in found if each.codec == str(Raw())), None)
    for each in found:
        cells = (f"{1e3 * each.crossing_seconds(rate):.1f}" for rate in RATES.values())
        limit = (
            "" if raw is None or raw is each else f"{each.pays_up_to(raw) / 1e6:.0f}"
        )
        table.add_row(each.codec, *cells, limit)
    rates = RATES.values()
    fastest = [min(found, key=partial(_seconds_at, rate)) for rate in rates]
    table.add_row("fastest", *(each.codec for each in fastest))
    console.print(table)


def _seconds_at(bits_per_second: float, time: CodecTime) -> float:
    return time.crossing_seconds(bits_per_second)


def main(
    *,
    shape: Annotated[str, typer.Option(help="Of the boundary.")] = "32,32,16,16",
    codecs: Annotated[str, typer.Option()] = ",".join(map(str, CODECS)),
    repeats: int = 15,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time what both ends of a cut compute for what crosses it."""
    torch.set_num_threads(1)
    speed = training_flops_per_second()
    found = measured(
        [codec_from_text(text) for text in codecs.split(",")],
        tuple(map(int, shape.split(","))),
        repeats=repeats,
    )
    if as_json:
        sys.stdout.write(json.dumps([asdict(each) for each in found]) + "\n")
    else:
        show(found, speed, Console(width=120))


if __name__ == "__main__":
    typer.run(main)
