// The int8 product of a tile of int8_product.h, for sm_90a. The main loop is CUTLASS's: the tensor memory accelerator
// brings in both operands, two warpgroups multiply them, the grid is persistent. The epilogue is a tree of ours:
// ((acc * sx[m]) * scale[n]) + bias[n] in fp32, each step rounded by itself (what includes this file is compiled with
// -fmad=false), as every backend does it.
#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "bias_row.cuh"
#include "int8_product.h"

namespace ditq {

namespace fusion = cutlass::epilogue::fusion;

// Two blocks, one above the other, share the tile of weights that they both need.
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

template <template <class> class Operation, class Left, class Right>
using Fp32 = fusion::Sm90EVT<
    fusion::Sm90Compute<Operation, float, float, cutlass::FloatRoundStyle::round_to_nearest>, Left, Right>;
// The last step also rounds to the output's type.
template <template <class> class Operation, class Output, class Left, class Right>
using Fp32To = fusion::Sm90EVT<
    fusion::Sm90Compute<Operation, Output, float, cutlass::FloatRoundStyle::round_to_nearest>, Left, Right>;

// 16-byte accesses.
constexpr int INT8_ALIGNMENT = 16;
constexpr int OUTPUT_ALIGNMENT = 8;

template <int INDEX, class Output>
struct Product {
    static constexpr bool ping_pong = Int8Tile<INDEX>::schedule == Schedule::ping_pong;
    using Tile = cute::Shape<cute::Int<Int8Tile<INDEX>::rows>, cute::Int<Int8Tile<INDEX>::outputs>, cute::_128>;
    using MainloopSchedule = cute::conditional_t<
        ping_pong, cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
    using EpilogueSchedule = cute::conditional_t<
        ping_pong, cutlass::epilogue::TmaWarpSpecialized, cutlass::epilogue::TmaWarpSpecializedCooperative>;

    using PerRow = fusion::Sm90ColBroadcast<0, Tile, float>;
    using PerOutput = fusion::Sm90RowBroadcast<0, Tile, float>;
    using RowScaled = Fp32<cutlass::multiplies, fusion::Sm90AccFetch, PerRow>;
    using Scaled = Fp32<cutlass::multiplies, RowScaled, PerOutput>;
    using Biased = Fp32To<cutlass::plus, Output, Scaled, BiasRow<Tile>>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, std::int32_t, float,  //
        void, cutlass::layout::RowMajor, OUTPUT_ALIGNMENT,                     //
        Output, cutlass::layout::RowMajor, OUTPUT_ALIGNMENT,                   //
        EpilogueSchedule, Biased>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,              //
        std::int8_t, cutlass::layout::RowMajor, INT8_ALIGNMENT,           //
        std::int8_t, cutlass::layout::ColumnMajor, INT8_ALIGNMENT,        //
        std::int32_t, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        MainloopSchedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<
        cute::Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static typename Gemm::Arguments arguments(const Int8Product& p) {
        const auto x_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {p.rows, p.inputs, 1});
        const auto w_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {p.outputs, p.inputs, 1});
        const auto y_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {p.rows, p.outputs, 1});
        const typename RowScaled::Arguments row_scaled{{}, {p.sx}, {}};
        const typename Scaled::Arguments scaled{row_scaled, {p.scale}, {}};
        return {
            cutlass::gemm::GemmUniversalMode::kGemm,
            {p.rows, p.outputs, p.inputs, 1},
            {p.qx, x_stride, p.qweight, w_stride},
            {{scaled, {p.bias, p.bias_type}, {}}, nullptr, y_stride, static_cast<Output*>(p.y), y_stride},
            {p.device, p.multiprocessors},
        };
    }

    static const char* launch(const Int8Product& p, void* workspace, cudaStream_t stream) {
        const auto given = arguments(p);
        auto status = Gemm::can_implement(given);
        Gemm gemm;
        if (status == cutlass::Status::kSuccess) status = gemm.initialize(given, workspace, stream);
        if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
        return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
    }
};

template <int INDEX>
std::size_t int8_workspace_bytes(const Int8Product& p) {
    using Bfloat16 = Product<INDEX, cutlass::bfloat16_t>;
    using Float16 = Product<INDEX, cutlass::half_t>;
    return p.y_type == FloatType::bfloat16 ? Bfloat16::Gemm::get_workspace_size(Bfloat16::arguments(p))
                                           : Float16::Gemm::get_workspace_size(Float16::arguments(p));
}

template <int INDEX>
const char* launch_int8_product(const Int8Product& p, void* workspace, cudaStream_t stream) {
    return p.y_type == FloatType::bfloat16 ? Product<INDEX, cutlass::bfloat16_t>::launch(p, workspace, stream)
                                           : Product<INDEX, cutlass::half_t>::launch(p, workspace, stream);
}

}  // namespace ditq

// Compiles the two functions for tile number INDEX. Most of the compiler's time goes into CUTLASS's headers, which is why
// several tiles share a file.
#define DITQ_INT8_TILE(INDEX)                                                   \
    template std::size_t ditq::int8_workspace_bytes<INDEX>(const Int8Product&); \
    template const char* ditq::launch_int8_product<INDEX>(const Int8Product&, void*, cudaStream_t)
