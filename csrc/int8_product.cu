// The int8 product of one tile of int8_product.h (DITQ_TILE, its index), for sm_90a. The main loop is CUTLASS's: the
// tensor memory accelerator brings in both operands, two warpgroups multiply them, the grid is persistent. The epilogue
// is a tree of ours: ((acc * sx[m]) * scale[n]) + bias[n] in fp32, each step rounded by itself (this file is compiled
// with -fmad=false), as every backend does it.
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
namespace {

namespace fusion = cutlass::epilogue::fusion;

constexpr bool ping_pong = Int8Tile<DITQ_TILE>::schedule == Schedule::ping_pong;
using Tile = cute::Shape<cute::Int<Int8Tile<DITQ_TILE>::rows>, cute::Int<Int8Tile<DITQ_TILE>::outputs>, cute::_128>;
// Two blocks, one above the other, share the tile of weights that they both need.
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
using MainloopSchedule = cute::conditional_t<
    ping_pong, cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using EpilogueSchedule = cute::conditional_t<
    ping_pong, cutlass::epilogue::TmaWarpSpecialized, cutlass::epilogue::TmaWarpSpecializedCooperative>;

template <template <class> class Operation, class Left, class Right>
using Fp32 = fusion::Sm90EVT<
    fusion::Sm90Compute<Operation, float, float, cutlass::FloatRoundStyle::round_to_nearest>, Left, Right>;
// The last step also rounds to the output's type.
template <template <class> class Operation, class Output, class Left, class Right>
using Fp32To = fusion::Sm90EVT<
    fusion::Sm90Compute<Operation, Output, float, cutlass::FloatRoundStyle::round_to_nearest>, Left, Right>;

using PerRow = fusion::Sm90ColBroadcast<0, Tile, float>;
using PerOutput = fusion::Sm90RowBroadcast<0, Tile, float>;
using RowScaled = Fp32<cutlass::multiplies, fusion::Sm90AccFetch, PerRow>;
using Scaled = Fp32<cutlass::multiplies, RowScaled, PerOutput>;

// 16-byte accesses.
constexpr int INT8_ALIGNMENT = 16;
constexpr int OUTPUT_ALIGNMENT = 8;

template <class Output>
struct Product {
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

}  // namespace

template <>
std::size_t int8_workspace_bytes<DITQ_TILE>(const Int8Product& product) {
    return product.y_type == FloatType::bfloat16
               ? Product<cutlass::bfloat16_t>::Gemm::get_workspace_size(Product<cutlass::bfloat16_t>::arguments(product))
               : Product<cutlass::half_t>::Gemm::get_workspace_size(Product<cutlass::half_t>::arguments(product));
}

template <>
const char* launch_int8_product<DITQ_TILE>(const Int8Product& product, void* workspace, cudaStream_t stream) {
    return product.y_type == FloatType::bfloat16 ? Product<cutlass::bfloat16_t>::launch(product, workspace, stream)
                                                 : Product<cutlass::half_t>::launch(product, workspace, stream);
}

}  // namespace ditq
