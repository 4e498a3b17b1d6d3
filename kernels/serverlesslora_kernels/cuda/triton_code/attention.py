"""Paged attention: cache writes, split-KV decode with its combining pass, and prefill chunks.

Scores live in base 2: `exp2` is the device's own instruction. Masked scores are -inf while running maxima start at a
finite -1e30, so that no difference of infinities ever makes a NaN. Key tiles start at multiples of TILE in a sequence
and are visited in ascending order, whatever the batch: a row's bits depend on its own sequence only.
"""

import triton
import triton.language as tl

from serverlesslora_kernels.cuda.triton_code.precision import dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit(do_not_specialize=["tokens"])
def write_kv(
    k_cache,
    v_cache,
    k,
    v,
    slots,
    tokens,
    k_block,
    k_slot,
    k_cache_head,
    v_block,
    v_slot,
    v_cache_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """PAIRS of a token and a head; the heads of a token are neighbours."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)[:, None]
    token, head = (pair // HEADS).to(tl.int64), pair % HEADS
    dim = tl.arange(0, DIM_PAD)[None, :]
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    held = slot >= 0
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    keys = tl.load(k + token * k_token + head * k_head + dim, mask=held & (dim < DIM_K), other=0.0)
    target = k_cache + block * k_block + offset * k_slot + head * k_cache_head + dim
    tl.store(target, keys, mask=held & (dim < DIM_K))
    values = tl.load(v + token * v_token + head * v_head + dim, mask=held & (dim < DIM_V), other=0.0)
    target = v_cache + block * v_block + offset * v_slot + head * v_cache_head + dim
    tl.store(target, values, mask=held & (dim < DIM_V))


@triton.jit
def attend_keys(
    acc,
    top,
    total,
    queries,  # [rows, DIM_K_PAD], zeros beyond the real ones
    position,  # [rows]: a row sees keys in (position - WINDOW, position]
    k_base,
    v_base,
    table,
    start,
    end,
    k_block,
    k_slot,
    v_block,
    v_slot,
    table_block,
    scale,
    softcap,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold keys [start, end) into (acc, top, total); unless MASKED every row sees all of them, and they fill tiles."""
    dim_k = tl.arange(0, queries.shape[1])[None, :]
    dim_v = tl.arange(0, acc.shape[1])[None, :]
    for tile in range(start, end, TILE):
        key = tile + tl.arange(0, TILE)
        if MASKED:
            held = key < end
            block = tl.load(table + (key // BLOCK_SIZE) * table_block, mask=held, other=0).to(tl.int64)
            k_mask, v_mask = held[:, None] & (dim_k < DIM_K), held[:, None] & (dim_v < DIM_V)
        else:
            block = tl.load(table + (key // BLOCK_SIZE) * table_block).to(tl.int64)
            k_mask, v_mask = dim_k < DIM_K, dim_v < DIM_V
        slot = key % BLOCK_SIZE
        keys = tl.load(k_base + (block * k_block + slot * k_slot)[:, None] + dim_k, mask=k_mask, other=0.0)
        values = tl.load(v_base + (block * v_block + slot * v_slot)[:, None] + dim_v, mask=v_mask, other=0.0)
        scores = dot(queries, tl.trans(keys)) * scale
        if SOFTCAP:
            shrunk = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
            capped = softcap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0, -capped, capped)
        scores = scores * LOG2_E
        if MASKED:
            seen = held[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + dot(rounded(weights, values.dtype), values)
        top = new_top
    return acc, top, total


@triton.jit
def chunks_of(context, TILE: tl.constexpr, WINDOW: tl.constexpr, MIN_TILES: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """How the keys of one decode row are cut, by its context alone: first tile's key, tiles per chunk, chunks."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0) // TILE * TILE
    tiles = tl.cdiv(context - begin, TILE)
    tiles_per_chunk = tl.maximum(tl.cdiv(tiles, MAX_CHUNKS), MIN_TILES)
    return begin, tiles_per_chunk, tl.cdiv(tiles, tiles_per_chunk)


@triton.jit(do_not_specialize=["table_seq", "table_block", "splits", "capacity"])
def decode_split(
    out,
    part,
    stats,
    q,
    k_cache,
    v_cache,
    sinks,
    decode,
    block_table,
    q_token,
    q_head,
    k_block,
    k_slot,
    k_head,
    v_block,
    v_slot,
    v_head,
    table_seq,
    table_block,
    splits,
    capacity,
    scale,
    softcap,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_K_PAD: tl.constexpr,
    DIM_V: tl.constexpr,
    DIM_V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Chunks split, split + splits, ... of one row and one KV head, its whole query group at once."""
    index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(decode + index * 3).to(tl.int64)
    seq = tl.load(decode + index * 3 + 1).to(tl.int64)
    context = tl.load(decode + index * 3 + 2)
    begin, tiles_per_chunk, num_chunks = chunks_of(context, TILE, WINDOW, MIN_TILES, MAX_CHUNKS)
    q_heads = tl.num_programs(1) * GROUP
    group = tl.arange(0, GROUP_PAD)
    head = kv_head * GROUP + group
    dim_k = tl.arange(0, DIM_K_PAD)[None, :]
    dim_v = tl.arange(0, DIM_V_PAD)[None, :]
    queries = tl.load(
        q + row * q_token + head[:, None] * q_head + dim_k,
        mask=(group < GROUP)[:, None] & (dim_k < DIM_K),
        other=0.0,
    )
    position = tl.zeros([GROUP_PAD], tl.int32) + (context - 1)
    k_base = k_cache + kv_head.to(tl.int64) * k_head
    v_base = v_cache + kv_head.to(tl.int64) * v_head
    table = block_table + seq * table_seq
    if SINGLE:
        acc, top, total = attend_keys(
            tl.zeros([GROUP_PAD, DIM_V_PAD], tl.float32),
            tl.full([GROUP_PAD], LOWEST, tl.float32),
            tl.zeros([GROUP_PAD], tl.float32),
            queries, position, k_base, v_base, table, begin, context,
            k_block, k_slot, v_block, v_slot, table_block, scale, softcap,
            DIM_K, DIM_V, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True,
        )  # fmt: skip
        if SINKS:
            sink = tl.load(sinks + head, mask=group < GROUP, other=0.0).to(tl.float32) * LOG2_E
            highest = tl.maximum(top, sink)
            weight = tl.exp2(top - highest)
            total = total * weight + tl.exp2(sink - highest)
            acc = acc * weight[:, None]
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + (row * q_heads + head[:, None]) * DIM_V + dim_v,
            rounded(acc, out.dtype.element_ty),
            mask=(group < GROUP)[:, None] & (dim_v < DIM_V),
        )
    else:
        for chunk in range(split, num_chunks, splits):
            start = begin + chunk * tiles_per_chunk * TILE
            acc, top, total = attend_keys(
                tl.zeros([GROUP_PAD, DIM_V_PAD], tl.float32),
                tl.full([GROUP_PAD], LOWEST, tl.float32),
                tl.zeros([GROUP_PAD], tl.float32),
                queries, position, k_base, v_base, table, start, tl.minimum(start + tiles_per_chunk * TILE, context),
                k_block, k_slot, v_block, v_slot, table_block, scale, softcap,
                DIM_K, DIM_V, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True,
            )  # fmt: skip
            place = (index.to(tl.int64) * q_heads + head) * capacity + chunk
            tl.store(stats + place * 2, top, mask=group < GROUP)
            tl.store(stats + place * 2 + 1, total, mask=group < GROUP)
            tl.store(part + place[:, None] * DIM_V + dim_v, acc, mask=(group < GROUP)[:, None] & (dim_v < DIM_V))


@triton.jit(do_not_specialize=["capacity"])
def decode_combine(
    out,
    part,
    stats,
    sinks,
    decode,
    capacity,
    DIM_V: tl.constexpr,
    DIM_V_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One row and one query head: the weighted sum of its chunks."""
    index, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(decode + index * 3).to(tl.int64)
    context = tl.load(decode + index * 3 + 2)
    _, _, num_chunks = chunks_of(context, TILE, WINDOW, MIN_TILES, MAX_CHUNKS)
    q_heads = tl.num_programs(1)
    base = (index.to(tl.int64) * q_heads + head) * capacity
    chunk = tl.arange(0, MAX_CHUNKS)
    tops = tl.load(stats + (base + chunk) * 2, mask=chunk < num_chunks, other=LOWEST)
    totals = tl.load(stats + (base + chunk) * 2 + 1, mask=chunk < num_chunks, other=0.0)
    highest = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    total = tl.sum(totals * tl.exp2(tops - highest), 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    dim = tl.arange(0, DIM_V_PAD)
    acc = tl.zeros([DIM_V_PAD], tl.float32)
    for first in range(0, num_chunks, 8):
        some = first + tl.arange(0, 8)
        top = tl.load(stats + (base + some) * 2, mask=some < num_chunks, other=LOWEST)
        values = tl.load(
            part + (base + some)[:, None] * DIM_V + dim[None, :],
            mask=(some < num_chunks)[:, None] & (dim < DIM_V)[None, :],
            other=0.0,
        )
        acc += tl.sum(values * tl.exp2(top - highest)[:, None], 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + (row * q_heads + head) * DIM_V + dim, rounded(acc, out.dtype.element_ty), mask=dim < DIM_V)


@triton.jit(do_not_specialize=["table_seq", "table_block"])
def attend_chunk(
    out,
    q,
    k_cache,
    v_cache,
    sinks,
    tiles,
    block_table,
    q_token,
    q_head,
    k_block,
    k_slot,
    k_head,
    v_block,
    v_slot,
    v_head,
    table_seq,
    table_block,
    scale,
    softcap,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_K_PAD: tl.constexpr,
    DIM_V: tl.constexpr,
    DIM_V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One of the PARTS of a query tile, ROWS rows of it, for one query head; heads vary fastest to share keys in L2."""
    head, part = tl.program_id(0), tl.program_id(1) % PARTS * ROWS
    tile = tiles + tl.program_id(1) // PARTS * 4
    num_rows = tl.load(tile + 2) - part
    if num_rows > 0:
        num_rows = tl.minimum(num_rows, ROWS)
        seq = tl.load(tile).to(tl.int64)
        first_position = tl.load(tile + 3) + part
        lane = tl.arange(0, ROWS)
        row = (tl.load(tile + 1) + part + lane).to(tl.int64)[:, None]
        dim_k = tl.arange(0, DIM_K_PAD)[None, :]
        dim_v = tl.arange(0, DIM_V_PAD)[None, :]
        real = (lane < num_rows)[:, None]
        queries = tl.load(q + row * q_token + head * q_head + dim_k, mask=real & (dim_k < DIM_K), other=0.0)
        position = first_position + lane
        kv_head = (head // GROUP).to(tl.int64)
        k_base = k_cache + kv_head * k_head
        v_base = v_cache + kv_head * v_head
        table = block_table + seq * table_seq
        end = first_position + num_rows
        acc = tl.zeros([ROWS, DIM_V_PAD], tl.float32)
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if SINKS:
            top = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
            total += 1.0
        if WINDOW > 0:
            begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE
        else:
            begin = (first_position + 1) // TILE * TILE
            acc, top, total = attend_keys(
                acc, top, total,
                queries, position, k_base, v_base, table, 0, begin,
                k_block, k_slot, v_block, v_slot, table_block, scale, softcap,
                DIM_K, DIM_V, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, False,
            )  # fmt: skip
        acc, top, total = attend_keys(
            acc, top, total,
            queries, position, k_base, v_base, table, begin, end,
            k_block, k_slot, v_block, v_slot, table_block, scale, softcap,
            DIM_K, DIM_V, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True,
        )  # fmt: skip
        q_heads = tl.num_programs(0)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # rows that are not real may see no key
        tl.store(
            out + (row * q_heads + head) * DIM_V + dim_v,
            rounded(acc, out.dtype.element_ty),
            mask=real & (dim_v < DIM_V),
        )
