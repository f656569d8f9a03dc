// Runs the CUDA kernels on the host, thread by thread, for tests: what CUDA provides, over one fibre per thread of a
// block. In each turn every fibre runs to its next barrier or shuffle; all must stop at the same kind, else the block
// would hang or read garbage on a device.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)
#define __shared__ static

struct Index {
  uint32_t x = 0, y = 0;
};
static Index threadIdx, blockIdx;

static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static double __dmul_rn(double a, double b) { return a * b; }
static double __dadd_rn(double a, double b) { return a + b; }
using std::floor;
using std::min;

enum class Stop { kBarrier, kShuffle, kEnd };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Stop stop = Stop::kEnd;
  double slot[2];  // of this shuffle and the next: a faster thread must not overwrite what a slower one has yet to read
  uint32_t shuffles = 0;
};

static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static void (*body)();

static void yield(Stop stop) {
  Fibre& self = fibres[threadIdx.x];
  self.stop = stop;
  swapcontext(&self.context, &scheduler);
}

static void __syncthreads() { yield(Stop::kBarrier); }
static void __syncwarp() { yield(Stop::kShuffle); }

template <typename T>
static T __shfl_xor_sync(uint32_t mask, T value, uint32_t distance) {
  if (mask != 0xffffffffu || distance >= 32) throw std::runtime_error("a shuffle of fewer than all lanes");
  const uint32_t self = threadIdx.x, turn = fibres[self].shuffles++ % 2;
  fibres[self].slot[turn] = value;
  yield(Stop::kShuffle);
  return T(fibres[self ^ distance].slot[turn]);
}

static void run_body() {
  body();
  yield(Stop::kEnd);
}

static bool run_block(uint32_t threads) {
  fibres.resize(threads);
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data(), fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr, fibre.shuffles = 0;
    makecontext(&fibre.context, run_body, 0);
  }
  for (;;) {
    for (uint32_t i = 0; i < threads; ++i) {
      threadIdx.x = i;
      swapcontext(&scheduler, &fibres[i].context);
    }
    for (const Fibre& fibre : fibres) {
      if (fibre.stop != fibres[0].stop) return false;
    }
    if (fibres[0].stop == Stop::kEnd) return true;
  }
}

#include "variants.cuh"

using namespace eco_m2f;

static bool diverged;
static int64_t launches;

struct HostStart {
  static constexpr int64_t kMaxImages = 2;  // so that small batches need several launches too

  template <typename... Arguments, typename... Given>
  void operator()(void (*kernel)(Arguments...), int64_t blocks, int64_t images, Given... given) const {
    static std::tuple<std::decay_t<Arguments>...>* arguments;
    static void (*current)(Arguments...);
    std::tuple<std::decay_t<Arguments>...> held(given...);
    arguments = &held, current = kernel;
    body = [] { std::apply(current, *arguments); };
    ++launches;
    for (blockIdx.y = 0; blockIdx.y < images; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) diverged |= !run_block(kThreads);
    }
  }
};

static Problem problem_of(const int64_t* sizes, const int64_t* shapes) {
  Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  int64_t start = 0;
  for (int64_t i = 0; i < p.levels; ++i) {
    p.level[i] = {shapes[2 * i], shapes[2 * i + 1], start};
    start += shapes[2 * i] * shapes[2 * i + 1];
  }
  return p;
}

static const char* checked(const char* error) {
  return error ? error : diverged ? "threads of a block went separate ways at a barrier or shuffle" : nullptr;
}

// As ms_deform_attn.cpp makes it of reference points [batch or 1, queries, levels or 1, 2]; strides: image, query,
// level.
static Reference reference_of(const void* points, const int64_t* strides) {
  return points ? Reference{points, strides[0], strides[1], strides[2]} : Reference{};
}

// sizes: batch, tokens, heads, channels, queries, levels, points. With a reference, from offsets and logits. Return
// null or what went wrong.
extern "C" const char* host_forward(const int64_t* sizes, const int64_t* shapes, int storage, const void* value,
                                    const void* locations, const void* weights, const void* reference,
                                    const int64_t* strides, void* output) {
  diverged = false, launches = 0;
  const ForwardPointers pointers{value, locations, weights, output, reference_of(reference, strides)};
  return checked(start_forward(problem_of(sizes, shapes), Storage(storage), pointers, HostStart{}));
}

extern "C" const char* host_backward(const int64_t* sizes, const int64_t* shapes, int storage, const void* grad_output,
                                     const void* value, const void* locations, const void* weights,
                                     const void* reference, const int64_t* strides, void* grad_value,
                                     void* grad_locations, void* grad_weights) {
  diverged = false, launches = 0;
  const BackwardPointers pointers{grad_output, value,          locations,    weights,
                                  grad_value,  grad_locations, grad_weights, reference_of(reference, strides)};
  return checked(start_backward(problem_of(sizes, shapes), Storage(storage), pointers, HostStart{}));
}

extern "C" int64_t host_launches() { return launches; }

// The plan for sizes that need not fit into memory: lanes, tile, blocks, fixed; returns null or what is too large.
extern "C" const char* host_plan(const int64_t* sizes, int64_t vector, int64_t element_bytes, int fused,
                                 int64_t* plan) {
  Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  const Plan made = make_plan(p, vector, element_bytes, fused);
  plan[0] = made.call.lanes, plan[1] = made.call.tile, plan[2] = made.blocks, plan[3] = made.fixed;
  return made.error;
}

// Elements by which the pointers move from image to image: of value, output, points.
extern "C" void host_strides(const int64_t* sizes, int64_t* strides) {
  const Strides made(Problem{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]});
  strides[0] = made.value, strides[1] = made.output, strides[2] = made.points;
}

// Index of the first point of a block, as a kernel computes it.
extern "C" int64_t host_first_point(const int64_t* sizes, int64_t block, int64_t image) {
  const Plan made = make_plan(Problem{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]}, 4, 4);
  blockIdx.x = uint32_t(block), blockIdx.y = uint32_t(image);
  using Generic = Variant<float, 4, false, false>;
  return first_point<Generic>(made.call, Shape<Generic>(made.call));
}
