"""Codes as decode attention reads them: words of 16 bits, whose same bits are elements of vectors at one place.

A word has the codes of 4, 2 or 1 neighbouring elements: place 0 is the first. Two words lie in a register, and what is
unpacked of them lies there as tensor cores take it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.kv_tiles import half_of, numbers


@triton.constexpr_function
def places_of(KIND):
    """Elements whose codes are in a word."""
    return 4 if KIND == "u4" else (1 if KIND == "float" else 2)


@triton.constexpr_function
def middle_of(KIND):
    """What `codes_at` takes away from codes."""
    return 8.0 if KIND == "u4" else (128.0 if KIND == "u8" else 0.0)


@triton.constexpr_function
def excess_of(KIND, PLACE, ASSEMBLY):
    """What `codes_at` leaves in codes that are not EXACT, beyond those that are."""
    if not ASSEMBLY or KIND not in ("u4", "u8", "s8"):
        return 0.0
    return (64.0 if KIND == "u4" and PLACE % 2 == 1 else 1024.0) + (128.0 if KIND == "s8" else middle_of(KIND))


@triton.jit
def places(table, start, numbers, kept, head, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The blocks of a tile's slots, one for all if it can be, and their places among those of all heads.

    The numbers are of any shape that has one dimension of TILE. The tile begins at slot `start` of a sequence, a
    multiple of TILE; some of its slots are `kept`.
    """
    if BLOCK_SIZE >= TILE:
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
        return block, head * BLOCK_SIZE + start % BLOCK_SIZE + (numbers - start)
    else:
        blocks = tl.load(table + numbers // BLOCK_SIZE, kept, 0).to(tl.int64)
        return blocks, head * BLOCK_SIZE + numbers % BLOCK_SIZE


@triton.jit
def in_blocks(plane, blocks, STRIDE: tl.constexpr):
    """Where blocks begin in a plane: pointers of their shape."""
    return plane + blocks * STRIDE


@triton.jit
def words(
    codes, blocks, slots, column, kept,
    KIND: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, THERE: tl.constexpr,
):  # fmt: skip
    """Words at a `column` of the vectors at these places; zeros where they are not `kept`, and behind a vector.

    In blocks that are THERE, integers are left as they are where they are not `kept`: they are finite. Blocks, slots
    and kept are [TILE, 1] and column [1, WIDTH], or the other way round.
    """
    COLUMNS: tl.constexpr = DIM // places_of(KIND)
    first = in_blocks(codes, blocks, STRIDE)
    if KIND != "float":
        first = first.to(tl.pointer_type(tl.int16))
    at = first + slots * COLUMNS + column
    if WIDTH > COLUMNS:
        return tl.load(at, kept & (column < COLUMNS), 0)
    elif THERE and (KIND == "u4" or KIND == "u8" or KIND == "s8"):
        return tl.load(at)
    else:
        return tl.load(at, kept, 0)


@triton.jit
def codes_at(
    words, PLACE: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, EXACT: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """The elements at a place as numbers of TYPE: codes less `middle_of`, and more `excess_of` unless EXACT.

    With ASSEMBLY a code is set in the fraction of a power of two: then TYPE is float16.
    """
    if KIND == "float":
        return words.to(TYPE)
    elif KIND == "e4m3" or KIND == "e5m2":
        return numbers((words >> (8 * PLACE)) & 255, KIND, TYPE)
    elif not ASSEMBLY:
        BITS: tl.constexpr = 4 if KIND == "u4" else 8
        codes = (words.to(tl.int32) >> (BITS * PLACE)) & ((1 << BITS) - 1)
        if KIND == "s8":
            codes = (codes ^ 128) - 128
        return codes.to(tl.float32).to(TYPE) - middle_of(KIND)
    else:
        # Of two nibbles of a byte the higher one is left where it is: there the power is 64.
        HIGH: tl.constexpr = KIND == "u4" and PLACE % 2 == 1
        SHIFT: tl.constexpr = PLACE // 2 * 8 if KIND == "u4" else PLACE * 8
        MASK: tl.constexpr = 0x00FF00FF if KIND != "u4" else (0x00F000F0 if HIGH else 0x000F000F)
        POWER: tl.constexpr = 0x54005400 if HIGH else (0x64806480 if KIND == "s8" else 0x64006400)
        LESS: tl.constexpr = 0xD480D480 if HIGH else (0xE408E408 if KIND == "u4" else 0xE480E480)
        SHIFTED: tl.constexpr = f"shr.u32 t, $1, {SHIFT};" if SHIFT else "mov.b32 t, $1;"
        # (word & mask) ^ power; what is signed has its highest bit turned over.
        RAISED: tl.constexpr = f"lop3.b32 t, t, {MASK}, {POWER}, 0x6A;"
        if EXACT:
            LESSENED: tl.constexpr = f"""{{ .reg .b32 t, one, less; mov.b32 one, 0x3C003C00; mov.b32 less, {LESS};
                {SHIFTED} {RAISED} fma.rn.f16x2 $0, t, one, less; }}"""
            return tl.inline_asm_elementwise(LESSENED, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            LEFT: tl.constexpr = f"{{ .reg .b32 t; {SHIFTED} {RAISED} mov.b32 $0, t; }}"
            return tl.inline_asm_elementwise(LEFT, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def scale_and_zero(words, ASSEMBLY: tl.constexpr):
    """Of `GroupedCodec`'s words the scale, and the zero less `middle_of` codes: x = (code - zero) * scale."""
    if ASSEMBLY:
        # Two at a time: six bits as a fraction of 1024, whose eighth less 132.5 is 3.5 - 8 plus an eighth of them.
        BOTH: tl.constexpr = """{ .reg .b32 t, eighth, less; mov.b32 eighth, 0x30003000; mov.b32 less, 0xD824D824;
            lop3.b32 t, $2, 0xFFC0FFC0, 0, 0xC0; shr.u32 $0, t, 1;
            lop3.b32 t, $2, 0x003F003F, 0x64006400, 0xEA; fma.rn.f16x2 $1, t, eighth, less; }"""
        step, zero = tl.inline_asm_elementwise(
            BOTH, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
        return step.to(tl.float32), zero.to(tl.float32)
    else:
        wide = words.to(tl.int32)
        return half_of((wide & 0xFFC0) >> 1), (wide & 63).to(tl.float32) * 0.125 - 4.5
