// Vectors of LANES floats by the compilers' vector extension, and functions of them. Included once for each instruction
// set, within its namespace and with LANES defined.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

// A number that is known when a generic lambda is compiled.
template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};

struct BFloat16 {
  uint16_t bits;
};

INLINE Vec splat(float value) {
  return value - Vec{};
}

INLINE Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Vec value) {
  __builtin_memcpy(to, &value, sizeof value);
}

INLINE Vec load(const BFloat16* from) {
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, BitVec) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void store(BFloat16* to, Vec value) {
  const BitVec bits = (BitVec)value;
  const BitVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitVec result = value != value ? BitVec{} + 0x7fc0 : rounded;
  const HalfVec half = __builtin_convertvector(result, HalfVec);
  __builtin_memcpy(to, &half, sizeof half);
}

// The first `count` lanes; the rest are zero.
template <class T>
INLINE Vec load_part(const T* from, int64_t count) {
  T lanes[LANES] = {};
  __builtin_memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
INLINE void store_part(T* to, Vec value, int64_t count) {
  T lanes[LANES];
  store(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(T));
}

// For float, masks where the processor has them: no detour through memory.
#if LANES == 16
INLINE Vec load_part(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, from);
}

INLINE void store_part(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, value);
}
#elif LANES == 8
INLINE __m256i lane_mask(int64_t count) {
  return (__m256i)(IntVec{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(count));
}

INLINE Vec load_part(const float* from, int64_t count) {
  return _mm256_maskload_ps(from, lane_mask(count));
}

INLINE void store_part(float* to, Vec value, int64_t count) {
  _mm256_maskstore_ps(to, lane_mask(count), value);
}
#endif

// `count` lanes where IS_PART, else all of them.
template <bool IS_PART, class T>
INLINE Vec load(const T* from, int64_t count) {
  return IS_PART ? load_part(from, count) : load(from);
}

template <bool IS_PART, class T>
INLINE void store(T* to, Vec value, int64_t count) {
  if (IS_PART)
    store_part(to, value, count);
  else
    store(to, value);
}

INLINE float sum(Vec value) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad parts[LANES / 4];
  __builtin_memcpy(parts, &value, sizeof parts);
  for (int step = LANES / 8; step; step /= 2)
    for (int i = 0; i < step; ++i)
      parts[i] += parts[i + step];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

INLINE Vec first_lanes(Vec value, int64_t count) {
  float lanes[LANES] = {};
  __builtin_memcpy(lanes, &value, count * sizeof(float));
  return load(lanes);
}

// The larger, the smaller of two. NaN stays NaN: x86 returns its second operand.
#if LANES == 16
INLINE Vec at_least(Vec value, float bound) {
  return _mm512_max_ps(splat(bound), value);
}

INLINE Vec at_most(Vec value, float bound) {
  return _mm512_min_ps(splat(bound), value);
}
#elif LANES == 8
INLINE Vec at_least(Vec value, float bound) {
  return _mm256_max_ps(splat(bound), value);
}

INLINE Vec at_most(Vec value, float bound) {
  return _mm256_min_ps(splat(bound), value);
}
#else
INLINE Vec at_least(Vec value, float bound) {
  return value < bound ? splat(bound) : value;
}

INLINE Vec at_most(Vec value, float bound) {
  return value > bound ? splat(bound) : value;
}
#endif

constexpr float LN2 = 0.6931471805599453f;
constexpr float LOG2E = 1.4426950408889634f;

// 2^value = power * (1 + rest) with |rest| < 0.42: for value in [-126, 126]. Relative error 1e-7.
INLINE void split_exp2(Vec value, Vec& power, Vec& rest) {
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  const Vec shifted = value + magic;
  const Vec f = value - (shifted - magic);
  power = (Vec)(((IntVec)shifted << 23) + (127 << 23));
  Vec p = f * 1.326511963e-03f + 9.671499953e-03f;
  p = p * f + 5.550732464e-02f;
  p = p * f + 2.402224243e-01f;
  p = p * f + 6.931470037e-01f;
  rest = p * f;
}

// 2^value for value <= 0.
INLINE Vec exp2_negative(Vec value) {
  Vec power, rest;
  split_exp2(at_least(value, -126.f), power, rest);
  return power * rest + power;
}

// 2^exponent * state + input for exponent <= 0. The factor itself is never rounded: near 1 that would change how
// long a state lasts.
INLINE Vec decay(Vec exponent, Vec state, Vec input) {
  Vec power, rest;
  split_exp2(at_least(exponent, -126.f), power, rest);
  const Vec scaled = power * state;
  return scaled * rest + (scaled + input);
}

INLINE Vec exp2(Vec value) {
  Vec power, rest;
  split_exp2(at_most(at_least(value, -126.f), 126.f), power, rest);
  return power * rest + power;
}

// 1 - 2^-value for value >= 0, without cancellation near 0.
INLINE Vec one_minus_exp2(Vec value) {
  Vec power, rest;
  split_exp2(at_least(-value, -126.f), power, rest);
  return (1.f - power) - power * rest;
}

// log2(1 + 2^value): the softplus in units of ln 2. Relative error 2e-7.
INLINE Vec softplus2(Vec value) {
  const Vec magnitude = (Vec)((BitVec)value & 0x7fffffff);
  const Vec e = exp2_negative(-magnitude);
  Vec p = e * 7.767560426e-03f - 4.344094545e-02f;
  p = p * e + 1.142769605e-01f;
  p = p * e - 1.983218491e-01f;
  p = p * e + 2.762056589e-01f;
  p = p * e - 3.585522175e-01f;
  p = p * e + 4.807109535e-01f;
  p = p * e - 7.213410735e-01f;
  p = p * e + 1.442695022e+00f;
  return p * e + at_least(value, 0.f);
}

INLINE Vec sigmoid(Vec value) {
  return 1.f / (1.f + exp2(value * -LOG2E));
}

INLINE Vec activate(Vec value, Activation activation) {
  if (activation == kRelu)
    return at_least(value, 0.f);
  return activation == kSilu ? value * sigmoid(value) : value;
}

// (rows, LANES) to (LANES, rows) for `rows` a multiple of LANES; strides in floats.
#if LANES >= 8
INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows) {
  for (int i = 0; i < rows; i += 8)
    for (int j = 0; j < LANES; j += 4) {
      // Rows r and r + 4 in the halves of a register, four columns of each.
      __m256 pair[4];
      for (int r = 0; r < 4; ++r) {
        const float* row = from + (i + r) * from_stride + j;
        pair[r] = _mm256_set_m128(_mm_loadu_ps(row + 4 * from_stride), _mm_loadu_ps(row));
      }
      const __m256 low01 = _mm256_unpacklo_ps(pair[0], pair[1]), high01 = _mm256_unpackhi_ps(pair[0], pair[1]);
      const __m256 low23 = _mm256_unpacklo_ps(pair[2], pair[3]), high23 = _mm256_unpackhi_ps(pair[2], pair[3]);
      float* out = to + j * to_stride + i;
      _mm256_storeu_ps(out, _mm256_shuffle_ps(low01, low23, 0x44));
      _mm256_storeu_ps(out + to_stride, _mm256_shuffle_ps(low01, low23, 0xee));
      _mm256_storeu_ps(out + 2 * to_stride, _mm256_shuffle_ps(high01, high23, 0x44));
      _mm256_storeu_ps(out + 3 * to_stride, _mm256_shuffle_ps(high01, high23, 0xee));
    }
}
#else
INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < LANES; ++j)
      to[j * to_stride + i] = from[i * from_stride + j];
}
#endif
