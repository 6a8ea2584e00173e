"""Bugs for the clustering operators and block means: each must make the tests named here fail."""

from __future__ import annotations

from mutants import Mutant

ASSIGN, KMEANS, SORT = "kmeans_assign.h", "kmeans.cu", "counting_sort.cu"
MEAN, PERMUTE = "block_mean.cu", "permute.cu"


def _bug(name: str, file: str, old: str, new: str, select: str) -> Mutant:
    return Mutant("clusters", f"clusters: {name}", f"kernels/select/{file}", old, new, "test_clusters.py", select)


MUTANTS = [
    # ---- nearest centroids: hazards
    _bug(
        "centroids are overwritten while a warp reads them",
        ASSIGN,
        "arch::cp_async_wait<C::kStages - 2>();\n    arch::syncthreads();",
        "arch::cp_async_wait<C::kStages - 2>();",
        "nearest_centroids",
    ),
    _bug(
        "centroids are read before they have landed",
        ASSIGN,
        "arch::cp_async_wait<C::kStages - 2>();",
        "arch::cp_async_wait<C::kStages - 1>();",
        "nearest_centroids",
    ),
    _bug(
        "tokens are overwritten before they are in registers",
        ASSIGN,
        "  arch::syncthreads();  // the tokens are in registers\n",
        "",
        "nearest_centroids",
    ),
    _bug(
        "tokens are read before they have landed",
        ASSIGN,
        "arch::cp_async_wait<0>();\n  arch::syncthreads();\n  uint32_t x",
        "arch::syncthreads();\n  uint32_t x",
        "nearest_centroids",
    ),
    # ---- nearest centroids: arithmetic and edges
    _bug("the last of equal distances wins", ASSIGN, "> best[m][e / 2])", ">= best[m][e / 2])", "equal_distances"),
    _bug(
        "equal distances of two lanes take either",
        ASSIGN,
        "|| (other == top && other_at < at)",
        "",
        "equal_distances",
    ),
    _bug(
        "padding is a centroid at the origin",
        KMEANS,
        "c < p.centres ? -0.5f * norm : -INFINITY",
        "-0.5f * norm",
        "nearest_centroids",
    ),
    _bug("whole norm instead of half of it", KMEANS, "-0.5f * norm", "-norm", "nearest_centroids"),
    _bug(
        "norm of the centroid before rounding",
        KMEANS,
        "    arch::unpack<T>(pair, low, high);\n",
        "",
        "rounded",
    ),
    _bug(
        "columns beyond D of an odd row are read",
        ASSIGN,
        "inside && d + 2 * e + 1 < p.dim ?",
        "inside ?",
        "nearest_centroids",
    ),
    _bug("labels beyond N are stored", ASSIGN, "lane % 4 == 0 && token < p.tokens", "lane % 4 == 0", "nearest"),
    _bug(
        "head stride of centroids ignored",
        KMEANS,
        "sequence % p.heads * p.centre.head_stride",
        "sequence % p.heads * p.centre.row_stride",
        "nearest_centroids",
    ),
    _bug(
        "rows with odd strides count as aligned",
        KMEANS,
        "(p.tokens <= 1 || p.x.row_stride % 8 == 0)",
        "true",
        "nearest_centroids",
    ),
    # ---- counting sort
    _bug(
        "counters are read before all tokens are counted",
        SORT,
        "1);\n    }\n    arch::syncthreads();",
        "1);\n    }",
        "test_sort",
    ),
    _bug(
        "a counter moves on before its lanes have read it",
        SORT,
        "int32_t(first + 32 * r);\n      arch::syncwarp();",
        "int32_t(first + 32 * r);",
        "test_sort",
    ),
    _bug(
        "warps start at one position",
        SORT,
        "arch::sts32(address + (w * kSlice + c) * 4, at);\n        at += n;",
        "arch::sts32(address + (w * kSlice + c) * 4, at);\n        at += n * 0;",
        "test_sort",
    ),
    _bug(
        "chunks start at one position",
        SORT,
        "entry = at;\n        at += n;",
        "entry = at;",
        "test_sort",
    ),
    _bug(
        "labels of earlier tiles are forgotten",
        SORT,
        "before += tile_total[0];",
        "before = tile_total[0];",
        "test_sort",
    ),
    _bug(
        "the total of a tile is read before it is there",
        SORT,
        "    arch::syncthreads();\n    before += tile_total[0];",
        "    before += tile_total[0];",
        "test_sort",
    ),
    _bug("negative labels are not clamped", SORT, "label < 0 ? 0 : label <", "label <", "test_sort"),
    _bug(
        "the counters of the last slice stay",
        SORT,
        "c < kWarps * kSlice; c += kThreads) arch::sts32(address + c * 4, 0)",
        "c < kWarps * kSlice && slice == 0; c += kThreads) arch::sts32(address + c * 4, 0)",
        "test_sort",
    ),
    # ---- means
    _bug("whole blocks take slots, too", MEAN, "(parts > 1 ? parts << 32 : 0)", "(parts << 32)", "means"),
    _bug("the last part of a block is lost", MEAN, "v[i] = k + i < parts ?", "v[i] = k + i + 1 < parts ?", "means"),
    _bug("kv_len does not count", MEAN, "limit = valid < limit ? valid : limit;", "", "means or left_out"),
    _bug("tokens that are left out are read", MEAN, "k + i < width && read >= 0 &&", "k + i < width &&", "means"),
    _bug(
        "rows of one half of the warp are not added",
        MEAN,
        "int step = width; step",
        "int step = 2 * width; step",
        "means",
    ),
    _bug(
        "parts are divided, too", MEAN, "const float n = whole && counted > 1", "const float n = counted > 1", "means"
    ),
    _bug(
        "lengths reach beyond the sequence",
        MEAN,
        "int32_t(n < p.tokens - start ? n : p.tokens - start)",
        "int32_t(n)",
        "damaged",
    ),
    _bug("one row of lengths serves all heads", MEAN, "(p.lengths_heads == 1 ? 0 : head)", "0", "different_lengths"),
    _bug("lengths of 8 bytes are read as 4", MEAN, "t.bytes == 8 ?", "t.bytes == 9 ?", "means"),
    _bug(
        "positions of earlier strips are forgotten",
        MEAN,
        "uint64_t first = before;",
        "uint64_t first = before * 0;",
        "means or more_blocks",
    ),
    # ---- permutation
    _bug(
        "order is read before it is there",
        PERMUTE,
        "uint32_t(token) : 0u);\n  }\n  arch::syncthreads();",
        "uint32_t(token) : 0u);\n  }",
        "permutation",
    ),
    _bug(
        "rows of 14 bytes move in pieces of 16",
        PERMUTE,
        "| uint64_t(p.dim) * p.element_bytes;",
        ";",
        "permutation",
    ),
    _bug(
        "inverse is ignored where rows are written",
        PERMUTE,
        "(p.inverse != 0 ? token : position)",
        "(position)",
        "permutation",
    ),
    _bug(
        "wild orders leave the tensor",
        PERMUTE,
        "token >= 0 && token < p.tokens ? uint32_t(token) : 0u",
        "uint32_t(token)",
        "damaged",
    ),
]
