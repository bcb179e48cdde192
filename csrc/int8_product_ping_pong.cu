// The tiles that two warpgroups take in turns.
#include "int8_product.cuh"

DITQ_INT8_TILE(3);
DITQ_INT8_TILE(4);
