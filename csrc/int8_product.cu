// The int8 product's launch, and its kernels for every tile of the table.
#include "int8_product.cuh"

#include <atomic>

namespace ditq {
namespace {

// A matrix of int8 [rows, inputs], of which boxes of `box_rows` rows and STEP inputs are copied; null, or why not.
const char* describe(CUtensorMap& map, const void* matrix, int rows, int inputs, int box_rows) {
    // The driver's function, looked up at run time: nothing links to the driver, and the library loads without one.
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const auto status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        const bool is_there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return is_there ? reinterpret_cast<Encode>(found) : nullptr;
    }();
    if (encode == nullptr) return "the driver does not know tensor maps: it must be that of CUDA 12 or later";
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(inputs), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(inputs)};
    const cuuint32_t box[] = {STEP, static_cast<cuuint32_t>(box_rows)}, apart[] = {1, 1};
    const CUresult status = encode(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), extents, strides, box, apart,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? nullptr : "the driver refuses to describe a matrix to the copy engine";
}

constexpr int MOST_DEVICES = 64;

// Clusters that the device runs at once: multiprocessors come in groups that clusters cannot span. Asked for once.
template <class Tile, class Kernel>
int clusters_at_once(Kernel* kernel, const cudaLaunchConfig_t& launch, const Int8Product& p) {
    static std::atomic<int> known[MOST_DEVICES];
    if (Tile::cluster == 1) return p.multiprocessors;
    const bool keeps = p.device < MOST_DEVICES;
    int found = keeps ? known[p.device].load() : 0;
    if (found == 0) {
        const auto status = cudaOccupancyMaxActiveClusters(&found, kernel, &launch);
        if (status != cudaSuccess || found <= 0) found = p.multiprocessors / Tile::cluster;
        if (keeps) known[p.device].store(found);
    }
    return found;
}

template <class Tile, class Output>
const char* launch(const Int8Product& p, cudaStream_t stream) {
    using P = Plan<Tile>;
    CUtensorMap qx, qweight;
    if (const char* refusal = describe(qx, p.qx, p.rows, p.inputs, Tile::rows)) return refusal;
    if (const char* refusal = describe(qweight, p.qweight, p.outputs, p.inputs, P::slice)) return refusal;
    const auto kernel = int8_product_kernel<Tile, Output>;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared_bytes);
    if (status != cudaSuccess) return cudaGetErrorString(status);

    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = Tile::cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    // Starts while the kernel before it ends, and waits for it before it reads.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.blockDim = dim3((1 + CONSUMERS) * WARPGROUP);
    launch.dynamicSmemBytes = P::shared_bytes;
    launch.stream = stream;
    launch.attrs = attributes;
    launch.numAttrs = 2;
    launch.gridDim = dim3(p.multiprocessors / Tile::cluster * Tile::cluster);
    const Int8Output output{p.sx, p.scale, p.bias, p.y, p.y_stride, p.bias_type, p.rows, p.outputs, p.inputs};
    const int tiles = tile_count<Tile>(output), clusters = clusters_at_once<Tile>(kernel, launch, p);
    launch.gridDim = dim3((tiles < clusters ? tiles : clusters) * Tile::cluster);
    status = cudaLaunchKernelEx(&launch, kernel, qx, qweight, output);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

template <int INDEX>
const char* launch_int8_product(const Int8Product& p, cudaStream_t stream) {
    return p.y_type == FloatType::bfloat16 ? launch<Int8Tile<INDEX>, __nv_bfloat16>(p, stream)
                                           : launch<Int8Tile<INDEX>, __half>(p, stream);
}

template const char* launch_int8_product<0>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<1>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<2>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<3>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<4>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<5>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<6>(const Int8Product&, cudaStream_t);
template const char* launch_int8_product<7>(const Int8Product&, cudaStream_t);

}  // namespace ditq
