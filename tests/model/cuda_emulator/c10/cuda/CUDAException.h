#pragma once

#define C10_CUDA_CHECK(expression) (void)(expression)
