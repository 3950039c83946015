"""Attention over packs by our Metal kernels: what they are given, and their gradients.

`metal/tree_attention.metal` says what they compute and how. Here are their tilings, the tables
that tell a pack's tokens who sees whom, and the function with its backward pass.
"""

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.kernels.source import launch

FILE = "tree_attention"
HEAD_DIMS = (64, 80, 96, 128, 256)
# Tokens of a threadgroup, and its threads; kRows and kThreads in the source.
ROWS, THREADS = 32, 128
# Registers of 32 bits that a thread on an Apple GPU has, and those that the kernels need for fragments on
# their way, addresses and sums of rows.
REGISTERS, OTHER_REGISTERS = 128, 36
# WHOSE in the source.
QUERIES, KEYS, VALUES = range(3)


class Tiling(NamedTuple):
    """How the kernels for one dtype and head dimension divide their work."""

    dtype: mx.Dtype
    head_dim: int

    @property
    def tile(self) -> int:
        """Tokens of a tile: two tiles stay below 18 KB of the 32 KB of threadgroup memory.

        Longer ones would also be computed in vain more often, at diagonals and ends of segments.
        """
        return 16 if self.head_dim * self.dtype.size <= 512 else 8

    @property
    def held(self) -> bool:
        """Whether the rows of a threadgroup stay in registers."""
        return max(self.registers(held=True).values()) <= REGISTERS

    def registers(self, held: bool | None = None) -> dict[str, int]:
        """Registers of a thread by kernel; a float fragment of 8 x 8 takes 2, a half one 1."""
        held = self.held if held is None else held
        blocks, tile = self.head_dim // 8, self.tile // 8
        rows = blocks * self.dtype.size // 2 if held else 0
        sums = 2 * blocks + OTHER_REGISTERS
        return {
            "forward": rows + sums + 2 * tile,
            "queries": 2 * rows + sums + 4 * tile,
            "keys": 2 * rows + sums + 4 * tile,
            "values": rows + sums + 2 * tile,
        }

    def template(self) -> dict:
        """Of the kernels; numbers, since MLX might take a bool for one."""
        return {"T": self.dtype, "D": self.head_dim, "R": self.tile, "HELD": int(self.held)}


class Tables(NamedTuple):
    """Who sees whom in a pack: ends and positions int32[B, P], spans int32[B, P / R, 4].

    P is the number of tokens in whole blocks of 32. Beyond the segments, ends are 0.
    """

    ends: mx.array
    positions: mx.array
    spans: mx.array


@functools.lru_cache(maxsize=32)
def make_tables(segments: tuple, rows: int, tokens: int, tile: int) -> Tables:
    """The tables of `segments` (row, start, end, parent) in `rows` of `tokens`."""
    # Two blocks at least, so that no table is too small for MLX to pass it as the kernels declare it.
    padded = max(2, -(-tokens // ROWS)) * ROWS
    ends, positions = (np.zeros((rows, padded), np.int32) for _ in range(2))
    depths, last = [], [segment.end for segment in segments]
    for segment in segments:
        above = segment.parent
        depth = depths[above] + segments[above].end - segments[above].start if above >= 0 else 0
        depths.append(depth)
        positions[segment.row, segment.start : segment.end] = depth + np.arange(
            segment.end - segment.start
        )
    # Children stand behind their parents.
    for i in reversed(range(len(segments))):
        row, start, end, above = segments[i]
        ends[row, start:end] = last[i]
        if above >= 0:
            last[above] = max(last[above], last[i])
    by_tile = (rows, padded // tile, tile)
    bounds = [f(x.reshape(by_tile), axis=-1) for x in (ends, positions) for f in (np.min, np.max)]
    return Tables(mx.array(ends), mx.array(positions), mx.array(np.stack(bounds, axis=-1)))


def flash_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    segments: Sequence,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> mx.array:
    """`tree_attention` by the Metal kernels, differentiable in q, k and v.

    q is [B, H, T, D], k and v are [B, G, T, D], all of one dtype, D one of `HEAD_DIMS`.
    """
    batch, heads, tokens, head_dim = q.shape
    tiling = Tiling(q.dtype, head_dim)
    tables = make_tables(tuple(segments), batch, tokens, tiling.tile)
    padded = tables.ends.shape[1]
    bits = struct.unpack("2i", struct.pack("2f", scale, softcap or 0.0))
    sizes = mx.array([heads, k.shape[1], tokens, padded, window or 0, *bits, 0], mx.int32)
    blocks = -(-tokens // ROWS) * THREADS

    def start(name, inputs, outputs, heads, **template):
        return launch(
            FILE,
            name,
            inputs,
            {**tiling.template(), **template},
            grid=(blocks, heads, batch),
            threadgroup=(THREADS, 1, 1),
            outputs=outputs,
        )

    @mx.custom_function
    def attend(q, k, v, *about):
        inputs = (q, k, v, *about)
        outputs = [(q.shape, q.dtype), ((batch, heads, padded), mx.float32)]
        return start("tree_attention_forward", inputs, outputs, heads)

    @attend.vjp
    def backward(primals, cotangents, outputs):
        q, k, v, *about = primals
        out, log_sums = outputs
        upstream = cotangents[0].astype(q.dtype)
        delta = (upstream.astype(mx.float32) * out.astype(mx.float32)).sum(axis=-1)
        delta = mx.pad(delta, [(0, 0), (0, 0), (0, padded - tokens)])

        def gradient(whose, like, *arrays):
            inputs = (*arrays, log_sums, delta, *about)
            outputs = [(like.shape, like.dtype)]
            return start("tree_attention_gradient", inputs, outputs, like.shape[1], WHOSE=whose)[0]

        return (
            gradient(QUERIES, q, q, upstream, k, v),
            gradient(KEYS, k, k, v, q, upstream),
            gradient(VALUES, v, k, v, q, upstream),
            *(None for _ in about),
        )

    return attend(q, k, v, *tables, sizes)[0]
