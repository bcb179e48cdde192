// An epilogue node for CUTLASS: a bias per output, of a float type known at run time, or none.
#pragma once

#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>

#include "load_float.cuh"

namespace ditq {

// CUTLASS's row broadcast, but for the copy of the tile's stretch of the row to shared memory, which converts to fp32 on
// the way: a bias has the model's dtype, and a template parameter for it would double the number of kernels.
template <class CtaTile>
struct BiasRow : cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float> {
    using Base = cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float>;
    using SharedStorage = typename Base::SharedStorage;

    struct Arguments {
        const void* bias = nullptr;
        FloatType type = FloatType::float32;
    };
    using Params = Arguments;

    template <class ProblemShape>
    static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
        return arguments;
    }
    template <class ProblemShape>
    static bool can_implement(const ProblemShape&, const Arguments&) {
        return true;
    }
    template <class ProblemShape>
    static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
        return 0;
    }
    template <class ProblemShape>
    static cutlass::Status initialize_workspace(
        const ProblemShape&, const Arguments&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    CUTLASS_HOST_DEVICE BiasRow() {}
    // The base sees a null row, of which it only makes layouts.
    CUTLASS_HOST_DEVICE BiasRow(const Params& params, const SharedStorage& storage)
        : Base(typename Base::Params{}, storage), bias(params) {}

    Params bias;

    template <class Callbacks>
    struct ConvertingCallbacks : Callbacks {
        CUTLASS_DEVICE ConvertingCallbacks(const Callbacks& callbacks, const Params& bias, int first, int outputs)
            : Callbacks(callbacks), bias(bias), first(first), outputs(outputs) {}

        Params bias;
        int first;    // output at which the tile begins
        int outputs;  // of the whole product

        CUTLASS_DEVICE void begin() {
            auto shared = cute::filter_zeros(this->tGS_sRow);
            auto column = cute::filter_zeros(this->tGS_cRow, this->tGS_gRow.stride());
            for (int i = 0; i < cute::size(shared); ++i) {
                const int inside = cute::get<1>(column(i));
                if (inside < cute::size<1>(CtaTile{})) {
                    const bool present = bias.bias != nullptr && first + inside < outputs;
                    shared(i) = present ? load_float(bias.bias, bias.type, first + inside) : 0.0f;
                }
            }
        }
    };

    template <bool REFERENCE_SOURCE, class... Args>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(
        const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
        auto callbacks = Base::template get_consumer_store_callbacks<REFERENCE_SOURCE>(args);
        const int first = static_cast<int>(cute::get<1>(args.tile_coord_mnkl)) * cute::size<1>(CtaTile{});
        const int outputs = static_cast<int>(cute::get<1>(args.problem_shape_mnkl));
        return ConvertingCallbacks<decltype(callbacks)>(callbacks, bias, first, outputs);
    }
};

}  // namespace ditq
