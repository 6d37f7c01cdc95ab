// How fast AMX multiplies tiles while others hold values: c++ -O2 -std=c++17 -mamx-tile -mamx-bf16
// benchmarks/tiles.cc -o tiles && ./tiles. Prints a JSON line for each number of tiles in use.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

namespace {

constexpr int kProducts = 20000, kTimes = 9;

alignas(64) unsigned char memory[4096];

struct alignas(64) Configuration {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void Occupy(int tiles) {  // tiles 0, 4 and 5 are multiplied
  static const Configuration configuration;
  _tile_loadconfig(&configuration);
  _tile_loadd(4, memory, 64);
  _tile_loadd(5, memory, 64);
  if (tiles > 3) _tile_loadd(1, memory, 64);
  if (tiles > 4) _tile_loadd(2, memory, 64);
  if (tiles > 5) _tile_loadd(3, memory, 64);
  if (tiles > 6) _tile_loadd(6, memory, 64);
  if (tiles > 7) _tile_loadd(7, memory, 64);
}

// Nanoseconds for each product, the median.
template <class Product>
double Time(const Product& product) {
  std::vector<double> times;
  for (int i = 0; i < kTimes; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    for (int n = 0; n < kProducts; ++n) product();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    times.push_back(took.count() / kProducts);
  }
  std::nth_element(times.begin(), times.begin() + kTimes / 2, times.end());
  return times[kTimes / 2];
}

}  // namespace

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {  // asks Linux for the registers
    std::fprintf(stderr, "no AMX here\n");
    return 1;
  }
  const auto multiply = [] { _tile_dpbf16ps(0, 4, 5); };
  const auto load_and_multiply = [] {
    _tile_loadd(4, memory, 64);
    _tile_loadd(5, memory + 1024, 64);
    _tile_dpbf16ps(0, 4, 5);
  };
  for (int tiles = 3; tiles <= 8; ++tiles) {
    Occupy(tiles);
    const double product = Time(multiply), loaded = Time(load_and_multiply);
    std::printf(
        "{\"tiles_in_use\": %d, \"product_ns\": %.1f, \"two_loads_and_product_ns\": %.1f}\n", tiles,
        product, loaded);
  }
  Occupy(3);
  usleep(200000);  // the thread loses its core, and gets all tiles back
  std::printf("{\"after_sleeping_product_ns\": %.1f, ", Time(multiply));
  Occupy(3);
  std::printf("\"configured_again_product_ns\": %.1f}\n", Time(multiply));
  _tile_release();
  return 0;
}
