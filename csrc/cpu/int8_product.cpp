// Compiled once for each level of instructions that multiply int8 (DITQ_LEVEL, a namespace; DITQ_TILE, the header with its
// tile; DITQ_LANES, the floats in a register), with -ffp-contract=off: each operation is rounded by itself.
//
// A task computes a stretch of rows by some outputs. It decodes the weights of a tile's outputs, a block of inputs at a
// time, into panels, which stay in the first cache while tiles of rows pass over them: nothing decoded outlives the call.
#include "int8_product.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "decode.h"
#include "epilogue.h"
#include DITQ_TILE

namespace ditq {
namespace DITQ_LEVEL {
namespace {

using Element = Tile::Element;
constexpr int ROWS = Tile::ROWS;
constexpr int PANEL = 16;  // outputs whose weights stand side by side, a dword of inputs of each
constexpr int PANELS = Tile::PANELS;
constexpr int WIDTH = PANELS * PANEL;  // outputs of a tile
static_assert(TASK_OUTPUTS % WIDTH == 0);
constexpr int PER_DWORD = 4 / sizeof(Element);
constexpr std::int64_t BLOCK = Tile::BLOCK;  // inputs of which weights are decoded at a time, at most
constexpr std::int64_t BLOCK_DWORDS = BLOCK / PER_DWORD;
constexpr std::int64_t PADDING = 128;  // of inputs; divisible by all groups, and what nibbles are stored in
static_assert(BLOCK % PADDING == 0);
constexpr int SMALLEST_GROUP = 32;
constexpr int MOST_GROUPS = BLOCK / SMALLEST_GROUP;

std::int64_t rounded_up(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }
std::int64_t padded_inputs(const Int8Product& given) { return rounded_up(given.inputs, PADDING); }

// Where input k of a row lies in a tile of activations.
std::int64_t offset(int row, std::int64_t k) {
    return (k / Tile::CHUNK * ROWS + row) * Tile::CHUNK + k % Tile::CHUNK;
}

// 8 rows of 8 dwords, `from_stride` dwords apart, to 8 columns, `to_stride` apart.
void transpose(const std::int32_t* from, std::int64_t from_stride, std::int32_t* to, std::int64_t to_stride) {
    __m256i row[8], pair[8], quad[8];
    for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            quad[i + 2 * j] = _mm256_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
            quad[i + 2 * j + 1] = _mm256_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        auto* low = reinterpret_cast<__m256i*>(to + i * to_stride);
        auto* high = reinterpret_cast<__m256i*>(to + (i + 4) * to_stride);
        _mm256_storeu_si256(low, _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20));
        _mm256_storeu_si256(high, _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31));
    }
}

// What a task works in; too large for a thread's stack.
struct Workspace {
    alignas(64) std::int32_t panels[PANELS][BLOCK_DWORDS * PANEL];
    // What a sum of shifted activations starts at, for each group or once.
    alignas(64) std::int32_t start[MOST_GROUPS][WIDTH];
    alignas(64) float scale[MOST_GROUPS][WIDTH];  // of each group
    alignas(64) Element rows[PANEL][BLOCK];
    alignas(64) std::int8_t codes[BLOCK];
    alignas(64) std::int32_t group_sums[ROWS * WIDTH];
};

class Task {
public:
    explicit Task(const Int8Product& given, const void* arranged)
        : given_(given), arranged_(static_cast<const Element*>(arranged)), padded_(padded_inputs(given)),
          block_(even_block(padded_)), segment_(given.promoted ? given.group : block_), work_(new Workspace),
          sums_(new std::int32_t[one_block() ? ROWS * WIDTH : rounded_up(given.task_rows, ROWS) * given.task_outputs]),
          tile_(std::min(segment_, padded_)) {}

    void run(std::int64_t first_row, std::int64_t first_output) {
        const std::int64_t last_row = std::min(first_row + given_.task_rows, given_.rows);
        const std::int64_t last_output = std::min(first_output + given_.task_outputs, given_.outputs);
        for (std::int64_t k = 0; k < padded_; k += block_) {
            const std::int64_t count = std::min(block_, padded_ - k);
            for (std::int64_t n = first_output; n < last_output; n += WIDTH) {
                for (int panel = 0; panel < PANELS; ++panel) pack(panel, n + panel * PANEL, k, count);
                load_scales(n, k, count);
                for (std::int64_t row = first_row; row < last_row; row += ROWS) {
                    const Element* x = arranged_ + row * padded_;
                    const std::int64_t column = (n - first_output) / WIDTH * given_.task_rows;
                    std::int32_t* sums = sums_.get() + (one_block() ? 0 : column + row - first_row) * WIDTH;
                    if (given_.promoted) {
                        add_groups(x, k, count, reinterpret_cast<float*>(sums));
                    } else {
                        multiply(x, k, 0, count, 0, sums, k == 0);
                    }
                    const std::int64_t rows = std::min<std::int64_t>(ROWS, given_.rows - row);
                    if (k + count == padded_) store_sums<WIDTH>(given_, sums, row, rows, n);
                }
            }
        }
    }

private:
    // Inputs of a block if all are to be equal, up to padding.
    static std::int64_t even_block(std::int64_t padded) {
        const std::int64_t blocks = (padded + BLOCK - 1) / BLOCK;
        return rounded_up((padded + blocks - 1) / blocks, PADDING);
    }
    bool one_block() const { return padded_ <= block_; }

    // Weights of the outputs from n on.
    void pack(int panel, std::int64_t n, std::int64_t k, std::int64_t count) {
        for (int i = 0; i < PANEL; ++i) {
            Element* row = work_->rows[i];
            std::int8_t* codes = sizeof(Element) == 1 ? reinterpret_cast<std::int8_t*>(row) : work_->codes;
            if (n + i < given_.outputs) {
                decode(given_, n + i, k, count, codes);
            } else {
                std::memset(codes, 0, count);
            }
            if constexpr (sizeof(Element) > 1) std::copy_n(codes, count, row);
            if constexpr (Tile::SHIFTED) {
                for (std::int64_t from = 0; from < count; from += segment_) {
                    std::int32_t sum = 0;
                    for (std::int64_t j = from; j < std::min(from + segment_, count); ++j) sum += codes[j];
                    work_->start[from / segment_][panel * PANEL + i] = -128 * sum;
                }
            }
        }
        const auto* rows = reinterpret_cast<const std::int32_t*>(work_->rows[0]);
        for (std::int64_t dword = 0; dword < count / PER_DWORD; dword += 8) {
            for (int i = 0; i < PANEL; i += 8) {
                transpose(rows + i * BLOCK_DWORDS + dword, BLOCK_DWORDS, work_->panels[panel] + dword * PANEL + i, PANEL);
            }
        }
    }

    void load_scales(std::int64_t n, std::int64_t k, std::int64_t count) {
        for (std::int64_t from = 0, group = 0; given_.promoted && k + from < given_.inputs && from < count; ++group) {
            const float* scale = given_.scale + (k + from) / segment_ * given_.outputs;
            load_outputs(given_, scale, n, WIDTH, work_->scale[group]);
            from += segment_;
        }
    }

    // Of `count` inputs that begin `from` inputs into the block at k: its group number `group`.
    void multiply(
        const Element* x, std::int64_t k, std::int64_t from, std::int64_t count, int group, std::int32_t* sums,
        bool first) const {
        tile_.multiply(
            x + offset(0, k + from), work_->panels[0] + from / PER_DWORD * PANEL, BLOCK_DWORDS * PANEL,
            work_->start[group], count / PER_DWORD, sums, first);
    }

    void add_groups(const Element* x, std::int64_t k, std::int64_t count, float* totals) const {
        std::int32_t* sums = work_->group_sums;
        for (std::int64_t from = 0, group = 0; from < count && k + from < given_.inputs; from += segment_, ++group) {
            multiply(x, k, from, segment_, group, sums, true);
            const float* scale = work_->scale[group];
            for (int i = 0; i < ROWS * WIDTH; i += LANES) {
                Lanes& total = *reinterpret_cast<Lanes*>(totals + i);
                const Lanes before = k + from == 0 ? Lanes{} : total;
                const IntLanes& sum = *reinterpret_cast<const IntLanes*>(sums + i);
                total = before + __builtin_convertvector(sum, Lanes) * *reinterpret_cast<const Lanes*>(scale + i % WIDTH);
            }
        }
    }

    const Int8Product& given_;
    const Element* arranged_;
    const std::int64_t padded_;
    const std::int64_t block_;
    const std::int64_t segment_;  // inputs that are summed in int32
    const std::unique_ptr<Workspace> work_;
    // [task_outputs / WIDTH, task_rows, WIDTH], or a tile's if no sum outlives a block; floats where groups are scaled.
    const std::unique_ptr<std::int32_t[]> sums_;
    const Tile tile_;
};

std::size_t arranged_bytes(const Int8Product& given) {
    return rounded_up(given.rows, ROWS) * padded_inputs(given) * sizeof(Element);
}

void arrange_chunk(const std::int8_t* from, Element* to) {
    for (int i = 0; i < Tile::CHUNK; ++i) to[i] = Tile::arranged(from[i]);
}

void arrange(const Int8Product& given, void* arranged, std::int64_t first, std::int64_t last) {
    constexpr std::int8_t NOTHING[Tile::CHUNK] = {};
    const std::int64_t padded = padded_inputs(given);
    for (std::int64_t tile = first; tile < last; ++tile) {
        Element* to = static_cast<Element*>(arranged) + tile * ROWS * padded;
        for (int row = 0; row < ROWS; ++row) {
            const std::int64_t m = tile * ROWS + row;
            const std::int64_t there = m < given.rows ? given.inputs : 0;
            const std::int8_t* x = given.x + m * given.inputs;
            std::int64_t k = 0;
            for (; k + Tile::CHUNK <= there; k += Tile::CHUNK) arrange_chunk(x + k, to + offset(row, k));
            if (k < there) {
                std::int8_t rest[Tile::CHUNK] = {};
                std::memcpy(rest, x + k, there - k);
                arrange_chunk(rest, to + offset(row, k));
                k += Tile::CHUNK;
            }
            for (; k < padded; k += Tile::CHUNK) arrange_chunk(NOTHING, to + offset(row, k));
        }
    }
}

void multiply(const Int8Product& given, const void* arranged, std::int64_t first, std::int64_t last) {
    const std::int64_t stretches = (given.rows + given.task_rows - 1) / given.task_rows;
    Task task(given, arranged);
    for (std::int64_t i = first; i < last; ++i) {
        task.run(i % stretches * given.task_rows, i / stretches * given.task_outputs);
    }
}

}  // namespace

extern const Int8ProductLevel int8_product{ROWS, Tile::FEWEST_ROWS, arranged_bytes, arrange, multiply};

}  // namespace DITQ_LEVEL
}  // namespace ditq
