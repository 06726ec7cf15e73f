"""The tiles of attention's kernels: how many queries and keys a program holds, and in which pieces the head dim.

Tiles want powers of two and head dims are none, so D is held as two pieces (72 = 64 + 16, 160 = 128 + 32), the second
at least 16, the least that tl.dot multiplies. Above WIDEST the operands do not fit: scores are summed over chunks of D
that are read again for every tile, and each program owns WIDEST columns of the output.
"""

from typing import NamedTuple

import torch
import triton

from .fastest import launch_fastest

WIDEST = 256  # the largest head dim whose operands are held, and the columns a program owns above it
WIDEST_OF_KEYS = 128  # the same where keys and values are held and both their gradients summed
WHOLE_KEYS = 128  # up to here all keys are held at once: one softmax, no rescaling


class Tile(NamedTuple):
    rows: int  # of one program: queries, or keys where the gradients of keys and values are computed
    columns: int  # of the tiles it loops over
    warps: int
    stages: int


def launch_with_fastest_tile(q, tiles, shape, launch):
    """launch(tile) with the fastest of tiles(*shape, capability): `shape` is the class of calls that share a choice."""
    if not q.is_cuda:
        return launch(_INTERPRETED)
    major = torch.cuda.get_device_capability(q.device)[0]
    capability = 8 if major == 12 else major  # sm_120 has the matrix instructions and shared memory of sm_8x
    launch_fastest((tiles.__name__, q.device, *shape), tiles(*shape, capability), launch)


# Candidates, the one that is predicted fastest first. No kernel of two-byte elements spills a register with any of them
# on sm_80, sm_90 or sm_100, as tests/ops/test_attention_gpu.py sees when it compiles them. float, each operand of which
# becomes two of tf32, still spills at D of 128 and more; where the library has CUDA kernels those come first.
# capability is the major one.
#
# Predicted, not measured: microseconds of the forward on an H200 in bf16 (132 SMs of 1.75 GHz, 2048 products and 16
# exponentials a cycle, 4.3 TB/s), every wave full; the largest column is the limit.
#   (B, H, Lq, Lk, D)          pieces    tensor cores  exponentials  memory
#   (1, 8, 4096, 4096, 40)     32 + 16   27            36            2
#   (1, 10, 4096, 4096, 64)    64        45            45            5
#   (1, 16, 1024, 1024, 72)    64 + 16   6             5             2
#   (2, 8, 1024, 1024, 80)     64 + 16   6             5             2
#   (2, 24, 1024, 1024, 128)   128       27            14            12
#   (1, 8, 256, 256, 160)      128 + 32  0.4           0.1           0.6
#   (1, 1, 4096, 4096, 512)    2 x 256   55            9             4      scores twice, once for each half of out
#   (1, 8, 4096, 77, 40)       32 + 16   0.5           0.7           1.2    keys 64 + 16, held
#   (2, 8, 1024, 77, 80)       64 + 16   0.4           0.4           1.3    keys 64 + 16, held


def forward_tiles(D, element_size, masks_scores, whole, capability):
    if element_size > 2:
        return (Tile(64, 32, 8, 1) if D <= 128 else Tile(32, 16, 4, 1),)
    if D > WIDEST and not masks_scores and capability >= 9:
        return Tile(64, 64, 8, 1), Tile(64, 32, 8, 1)
    if masks_scores or D > 160:
        return (_forward_under_pressure(D, masks_scores, whole, capability),)
    if whole:
        return Tile(128, 64, 8, 1), Tile(64, 64, 4, 1)
    if D <= 64:
        first = Tile(128, 64, 4, 3) if capability < 10 else Tile(128, 64, 8, 2)
        return first, Tile(128, 128, 8, 2), Tile(64, 64, 4, 2)
    if capability < 9 and D > 128:
        return (Tile(64, 32, 8, 1),)
    if capability < 9 and D % 16:  # to mask the last columns of the second piece takes registers
        return (Tile(128, 32, 8, 2),)
    return Tile(128, 64, 8, 2), Tile(64, 64 if D <= 128 or capability > 9 else 32, 4, 2)


def _forward_under_pressure(D, masks_scores, whole, capability):
    """The one tile whose registers suffice for a mask of all scores, or for a wide head dim."""
    if D <= 64:
        return Tile(64, 64, 8, 2)
    if D <= 128 or (D <= 160 and capability >= 9):
        return Tile(128, 32, 8, 2)
    if 160 < D <= WIDEST and whole and capability < 9:
        return Tile(32, 32, 8, 1)
    if 160 < D <= WIDEST and masks_scores and capability == 9:
        return Tile(64, 16, 8, 1)
    return Tile(64, 32, 8, 1)


def query_gradient_tiles(D, element_size, capability):
    if element_size > 2:
        return (Tile(32, 32, 8, 1) if D <= 128 else Tile(32, 16, 8, 1),)
    return (Tile(64, 64, 8, 2) if D <= 128 else Tile(64, 32, 8, 2 if capability >= 9 else 1),)


def key_gradient_tiles(D, element_size, capability):
    if element_size > 2:
        return (Tile(32, 32, 8, 1) if D <= 64 else Tile(32, 16, 8, 1),)
    return (Tile(64, 16, 8, 1) if capability < 9 else Tile(64, 32, 8, 2 if capability < 10 else 1),)


def mask_gradient_tiles(D, element_size, capability):
    return (Tile(64, 32, 8, 2) if element_size == 2 else Tile(32, 32, 8, 1),)


# The interpreter takes as long for a large tile as for a small one.
_INTERPRETED = Tile(128, 128, warps=1, stages=1)


def pieces(n):
    """Two powers of two, the second at least 16 or none, that n fits in with the least waste."""
    n = max(16, triton.cdiv(n, 16) * 16)
    first = 1 << n.bit_length() - 1
    rest = triton.next_power_of_2(n - first) if n > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


def head_pieces(D, element_size, widest):
    """The pieces of D that are held, or the columns that a program owns and the chunks it reads."""
    D0, D1 = pieces(D) if widest >= D else (widest, 0)
    return {"D": D, "D0": D0, "D1": D1, "CHUNK": 0 if widest >= D else 128 // element_size}


def column_blocks(D, widest):
    return 1 if widest >= D else triton.cdiv(D, widest)
