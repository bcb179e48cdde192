// The tiles that two warpgroups split.
#include "int8_product.cuh"

DITQ_INT8_TILE(0);
DITQ_INT8_TILE(1);
DITQ_INT8_TILE(2);
