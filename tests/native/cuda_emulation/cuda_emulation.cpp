#include "cuda_emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim;

namespace emulation {
namespace {

constexpr size_t kStack = size_t(256) << 10;
constexpr size_t kGuard = 4096;
constexpr unsigned char kPoison = 0xff; // NaN in every floating dtype
constexpr size_t kLargestExchange = 16;

struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = false;
};

// Kept between launches: stacks are expensive.
std::vector<Fiber> fibers;
ucontext_t scheduler;
int current = -1;
const std::function<void()>* body;
Barrier whole_block;
std::vector<Barrier> warps;
std::vector<unsigned char> slots; // what each thread gives in an exchange
std::vector<unsigned char> shared;
int64_t progress;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u, %u)\n", what, blockIdx.x,
               threadIdx.x, threadIdx.y);
  std::abort();
}

void wait_at(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  ++progress;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

void enter() {
  (*body)();
  fibers[current].done = true;
  ++progress;
  swapcontext(&fibers[current].context, &scheduler);
}

void resume(int i) {
  current = i;
  threadIdx = fibers[i].index;
  swapcontext(&scheduler, &fibers[i].context);
}

std::vector<int> order_of(int threads) {
  static const char* wanted = std::getenv("CO2S_EMULATION_ORDER");
  static std::mt19937 generator(1);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  const std::string name = wanted == nullptr ? "forward" : wanted;
  if (name == "reverse") std::reverse(order.begin(), order.end());
  if (name == "random") std::shuffle(order.begin(), order.end(), generator);
  return order;
}

void prepare(const dim3& threads) {
  const int count = static_cast<int>(threads.x * threads.y);
  if (fibers.size() < static_cast<size_t>(count)) fibers.resize(count);
  whole_block = {count, 0, 0};
  warps.assign((count + 31) / 32, Barrier{32, 0, 0});
  slots.assign(count * kLargestExchange, 0);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.done = false;
    fiber.index = dim3(i % threads.x, i / threads.x);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter, 0);
  }
}

void run_block(int count) {
  for (int left = count; left > 0;) {
    const int64_t before = progress;
    for (int i : order_of(count)) {
      if (fibers[i].done) continue;
      resume(i);
      left -= fibers[i].done;
    }
    if (progress == before) fail("threads wait at a barrier that others never reach");
  }
}

} // namespace

void run(int64_t blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads.x * threads.y > 1024 || (threads.x * threads.y) % 32 != 0) {
    fail("a block is at most 1024 threads, here in whole warps");
  }
  if (shared_bytes > (48 << 10)) fail("more than 48 KiB of dynamic shared memory");
  if (blocks < 1 || blocks > INT32_MAX) fail("a grid of impossible size");
  body = &kernel;
  blockDim = threads;
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx = dim3(static_cast<unsigned>(block));
    shared.assign(shared_bytes + kGuard, kPoison);
    prepare(threads);
    run_block(static_cast<int>(threads.x * threads.y));
    for (size_t i = shared_bytes; i < shared.size(); ++i) {
      if (shared[i] != kPoison) fail("a write past the dynamic shared memory");
    }
  }
}

unsigned char* dynamic_shared() { return shared.data(); }

void exchange(void* value, size_t bytes, int step) {
  const int lane = current % 32, warp = current / 32, me = current;
  std::memcpy(&slots[me * kLargestExchange], value, bytes);
  wait_at(warps[warp]);
  const int other = lane + step < 32 ? me + step : me;
  std::memcpy(value, &slots[other * kLargestExchange], bytes);
  wait_at(warps[warp]); // everyone has read before anyone gives again
}

} // namespace emulation

void __syncthreads() { emulation::wait_at(emulation::whole_block); }
