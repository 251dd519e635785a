// The kernels of one instruction set. Included once for each, within its namespace and with LANES and NAME defined.
#include "cpu/vector.h"

#include "cpu/channels.h"

#include "scan/cpu_kernels.h"

#include "scan/cpu_backward_kernels.h"

#include "layers/product_kernels.h"

#include "layers/depthwise_kernels.h"

#include "layers/wavelet_kernels.h"

#include "layers/norm_kernels.h"

static const Kernels TABLE = {
    NAME, LANES,
#define KERNEL(result, name, ...) name,
    FOR_EACH_KERNEL(KERNEL)
#undef KERNEL
};
