// Compiled once for each level of instructions that multiply int8 (DITQ_LEVEL, a namespace; DITQ_TILE, the header with its
// tile; DITQ_LANES, the floats in a register), with -ffp-contract=off: each operation is rounded by itself.
//
// A task computes a stretch of rows by TASK_OUTPUTS outputs. It decodes the weight a block of inputs at a time into panels,
// which stay in the second cache while tiles of rows pass over them: nothing decoded outlives the call.
#include "int8_product.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "decode.h"
#include DITQ_TILE

namespace ditq {
namespace DITQ_LEVEL {
namespace {

constexpr int LANES = DITQ_LANES;
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int32_t IntLanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

using Element = Tile::Element;
constexpr int ROWS = Tile::ROWS;
constexpr int PANEL = 16;  // outputs whose weights stand side by side, a dword of inputs of each
constexpr int PANELS = TASK_OUTPUTS / PANEL;
constexpr int PER_DWORD = 4 / sizeof(Element);
constexpr std::int64_t BLOCK = 640;  // inputs of which weights are decoded at a time, at most: 40 KB of int8 panels
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
    alignas(64) std::int32_t start[MOST_GROUPS][TASK_OUTPUTS];
    alignas(64) float scale[MOST_GROUPS][TASK_OUTPUTS];  // of each group
    alignas(64) Element rows[PANEL][BLOCK];
    alignas(64) std::int8_t codes[BLOCK];
    alignas(64) std::int32_t group_sums[ROWS * Tile::PANELS * PANEL];
};

class Task {
public:
    explicit Task(const Int8Product& given, const void* arranged)
        : given_(given), arranged_(static_cast<const Element*>(arranged)), padded_(padded_inputs(given)),
          block_(even_block(padded_)), segment_(given.promoted ? given.group : block_), work_(new Workspace),
          sums_(new std::int32_t[(one_block() ? ROWS : rounded_up(given.task_rows, ROWS)) * TASK_OUTPUTS]),
          tile_(std::min(segment_, padded_)) {}

    void run(std::int64_t first_row, std::int64_t first_output) {
        const std::int64_t last_row = std::min(first_row + given_.task_rows, given_.rows);
        const std::int64_t outputs = std::min(TASK_OUTPUTS, given_.outputs - first_output);
        const std::int64_t panels = rounded_up(outputs, PANEL * Tile::PANELS) / PANEL;
        for (std::int64_t k = 0; k < padded_; k += block_) {
            const std::int64_t count = std::min(block_, padded_ - k);
            for (std::int64_t panel = 0; panel < panels; ++panel) pack(panel, first_output + panel * PANEL, k, count);
            for (std::int64_t panel = 0; panel < panels; panel += Tile::PANELS) {
                const std::int64_t n = first_output + panel * PANEL;
                for (std::int64_t row = first_row; row < last_row; row += ROWS) {
                    const Element* x = arranged_ + row * padded_;
                    const std::int64_t kept_row = one_block() ? 0 : row - first_row;
                    std::int32_t* sums = sums_.get() + kept_row * TASK_OUTPUTS + panel * PANEL;
                    if (given_.promoted) {
                        add_groups(x, panel, k, count, reinterpret_cast<float*>(sums));
                    } else {
                        multiply(x, panel, k, 0, count, 0, sums, TASK_OUTPUTS, k == 0);
                    }
                    if (k + count == padded_) finish(sums, row, n);
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

    void pack(std::int64_t panel, std::int64_t n, std::int64_t k, std::int64_t count) {
        for (int i = 0; i < PANEL; ++i) {
            Element* row = work_->rows[i];
            if (n + i < given_.outputs) {
                decode(given_, n + i, k, count, work_->codes);
            } else {
                std::memset(work_->codes, 0, count);
            }
            for (std::int64_t j = 0; j < count; ++j) row[j] = work_->codes[j];
            if constexpr (Tile::SHIFTED) {
                for (std::int64_t from = 0; from < count; from += segment_) {
                    std::int32_t sum = 0;
                    for (std::int64_t j = from; j < std::min(from + segment_, count); ++j) sum += work_->codes[j];
                    work_->start[from / segment_][panel * PANEL + i] = -128 * sum;
                }
            }
        }
        for (std::int64_t from = 0, group = 0; given_.promoted && k + from < given_.inputs && from < count; ++group) {
            const float* scale = given_.scale + (k + from) / segment_ * given_.outputs;
            load_outputs(scale, n, PANEL, work_->scale[group] + panel * PANEL);
            from += segment_;
        }
        const auto* rows = reinterpret_cast<const std::int32_t*>(work_->rows[0]);
        for (std::int64_t dword = 0; dword < count / PER_DWORD; dword += 8) {
            for (int i = 0; i < PANEL; i += 8) {
                transpose(rows + i * BLOCK_DWORDS + dword, BLOCK_DWORDS, work_->panels[panel] + dword * PANEL + i, PANEL);
            }
        }
    }

    // Of `count` inputs that begin `from` inputs into the block at k: its group number `group`.
    void multiply(
        const Element* x, std::int64_t panel, std::int64_t k, std::int64_t from, std::int64_t count, int group,
        std::int32_t* sums, std::int64_t stride, bool first) const {
        tile_.multiply(
            x + offset(0, k + from), work_->panels[panel] + from / PER_DWORD * PANEL, BLOCK_DWORDS * PANEL,
            work_->start[group] + panel * PANEL, count / PER_DWORD, sums, stride, first);
    }

    void add_groups(const Element* x, std::int64_t panel, std::int64_t k, std::int64_t count, float* totals) const {
        constexpr int WIDTH = Tile::PANELS * PANEL;
        std::int32_t* sums = work_->group_sums;
        for (std::int64_t from = 0, group = 0; from < count && k + from < given_.inputs; from += segment_, ++group) {
            multiply(x, panel, k, from, segment_, group, sums, WIDTH, true);
            const float* scale = work_->scale[group] + panel * PANEL;
            for (int row = 0; row < ROWS; ++row) {
                for (int i = 0; i < WIDTH; i += LANES) {
                    Lanes& total = *reinterpret_cast<Lanes*>(totals + row * TASK_OUTPUTS + i);
                    const Lanes before = k + from == 0 ? Lanes{} : total;
                    const IntLanes& sum = *reinterpret_cast<const IntLanes*>(sums + row * WIDTH + i);
                    total = before + __builtin_convertvector(sum, Lanes) * *reinterpret_cast<const Lanes*>(scale + i);
                }
            }
        }
    }

    // The values of `count` outputs from the n-th on; zeros past the last.
    void load_outputs(const float* values, std::int64_t n, std::int64_t count, float* to) const {
        const std::int64_t there = std::max<std::int64_t>(std::min(count, given_.outputs - n), 0);
        std::memset(to, 0, count * sizeof(float));
        std::memcpy(to, values + n, there * sizeof(float));
    }

    void finish(const std::int32_t* sums, std::int64_t first_row, std::int64_t n) const {
        switch (given_.out_type) {
            case OutputType::int32: return finish_as<OutputType::int32>(sums, first_row, n);
            case OutputType::float32: return finish_as<OutputType::float32>(sums, first_row, n);
            case OutputType::bfloat16: return finish_as<OutputType::bfloat16>(sums, first_row, n);
            default: return finish_as<OutputType::float16>(sums, first_row, n);
        }
    }

    template <OutputType TYPE>
    void finish_as(const std::int32_t* sums, std::int64_t first_row, std::int64_t n) const {
        constexpr int WIDTH = Tile::PANELS * PANEL;
        const bool promoted = given_.promoted, has_bias = given_.bias != nullptr;
        const std::int64_t outputs = given_.outputs, rows = std::min<std::int64_t>(ROWS, given_.rows - first_row);
        float scales[WIDTH], biases[WIDTH];
        if (!promoted) load_outputs(given_.scale, n, WIDTH, scales);
        if (has_bias) load_outputs(given_.bias, n, WIDTH, biases);
        for (int i = 0; i < WIDTH && n + i < outputs; i += LANES) {
            const Lanes scale = *reinterpret_cast<const Lanes*>(scales + i);
            const Lanes bias = *reinterpret_cast<const Lanes*>(biases + i);
            const std::int64_t count = std::min<std::int64_t>(LANES, outputs - n - i);
            for (std::int64_t row = 0; row < rows; ++row) {
                const float sx = given_.sx[first_row + row];
                const IntLanes& sum = *reinterpret_cast<const IntLanes*>(sums + row * TASK_OUTPUTS + i);
                Lanes y;
                if (promoted) {
                    y = reinterpret_cast<const Lanes&>(sum) * sx;
                } else {
                    y = __builtin_convertvector(sum, Lanes) * sx;
                    y *= scale;
                }
                if (has_bias) y += bias;
                const std::int64_t index = (first_row + row) * outputs + n + i;
                if constexpr (TYPE == OutputType::int32) put(sum, index, count);
                if constexpr (TYPE == OutputType::float32) put(y, index, count);
                if constexpr (TYPE == OutputType::bfloat16) put(to_bfloat16(y), index, count);
                if constexpr (TYPE == OutputType::float16) put(to_float16(y), index, count);
            }
        }
    }

    template <class Values>
    void put(const Values& values, std::int64_t index, std::int64_t count) const {
        constexpr int SIZE = sizeof(Values) / LANES;
        auto* to = static_cast<std::uint8_t*>(given_.out) + index * SIZE;
        if (count == LANES) {
            std::memcpy(to, &values, sizeof(Values));
        } else {
            std::memcpy(to, &values, count * SIZE);
        }
    }

    typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));

    // To nearest, ties to even.
    static Halves to_bfloat16(const Lanes& y) {
        typedef std::uint32_t Bits __attribute__((vector_size(4 * LANES), may_alias));
        Bits bits;
        std::memcpy(&bits, &y, sizeof bits);
        const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
        const Bits is_nan = (bits & 0x7fffffff) > 0x7f800000;
        return __builtin_convertvector((is_nan ? Bits{} + 0x7fc00000 : rounded) >> 16, Halves);
    }

    static Halves to_float16(const Lanes& y) {
        Halves halves;
        for (int i = 0; i < LANES; i += 8) {
            const __m256 eight = _mm256_loadu_ps(reinterpret_cast<const float*>(&y) + i);
            const __m128i found = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT);
            std::memcpy(reinterpret_cast<std::uint16_t*>(&halves) + i, &found, sizeof found);
        }
        return halves;
    }

    const Int8Product& given_;
    const Element* arranged_;
    const std::int64_t padded_;
    const std::int64_t block_;
    const std::int64_t segment_;  // inputs that are summed in int32
    const std::unique_ptr<Workspace> work_;
    // [task_rows, TASK_OUTPUTS], or a tile's rows if no sum outlives a block; floats where groups are scaled.
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
        task.run(i % stretches * given.task_rows, i / stretches * TASK_OUTPUTS);
    }
}

}  // namespace

extern const Int8ProductLevel int8_product{ROWS, arranged_bytes, arrange, multiply};

}  // namespace DITQ_LEVEL
}  // namespace ditq
