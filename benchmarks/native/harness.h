// What the native programs share: memory and handles that go with their owner, hashed test data,
// and lists on the command line.
#ifndef JAXMOE_BENCHMARKS_NATIVE_HARNESS_H_
#define JAXMOE_BENCHMARKS_NATIVE_HARNESS_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace jaxmoe::native {

[[noreturn]] inline void die(const std::string& why) {
  std::fflush(stdout);
  std::fprintf(stderr, "\n%s\n", why.c_str());
  std::exit(2);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) die(std::string(what) + ": " + cudaGetErrorString(error));
}

// Streams, events, graphs and memory all go with their last owner.
template <class T>
std::shared_ptr<T> own(T* handle, cudaError_t (*release)(T*)) {
  return {handle, release};
}

template <class T>
std::shared_ptr<T> create(cudaError_t (*make)(T**), cudaError_t (*release)(T*)) {
  T* handle = nullptr;
  check(make(&handle), "create");
  return own(handle, release);
}

template <class T>
std::shared_ptr<T> allocate(int64_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return {memory, cudaFree};
}

template <class T>
std::shared_ptr<T> upload(const std::vector<T>& values) {
  const auto memory = allocate<T>(values.size());
  const size_t bytes = values.size() * sizeof(T);
  check(cudaMemcpy(memory.get(), values.data(), bytes, cudaMemcpyHostToDevice), "upload");
  return memory;
}

template <class T>
std::vector<T> download(const std::shared_ptr<T>& memory, int64_t count) {
  std::vector<T> values(count);
  check(cudaMemcpy(values.data(), memory.get(), count * sizeof(T), cudaMemcpyDeviceToHost),
        "download");
  return values;
}

__host__ __device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<uint32_t>(x);
}

// Sums of four uniform numbers: about normal, with unit variance.
__device__ inline float normal(uint64_t i) {
  float sum = 0.0f;
  for (int j = 0; j < 4; ++j) sum += static_cast<float>(hash(4 * i + j) >> 8) * 0x1p-24f;
  return (sum - 2.0f) * 1.7f;
}

struct Layer {
  std::string name;
  int hidden, intermediate, experts, top_k;
};
inline const Layer kLayers[] = {
    {"qwen3-30b-a3b", 2048, 768, 128, 8},
    {"gpt-oss-20b", 2880, 2880, 32, 4},
    {"gpt-oss-120b", 2880, 2880, 128, 4},
    {"mixtral-8x7b", 4096, 14336, 8, 2},
    {"deepseek-v3-ep8", 7168, 2048, 32, 8},
    {"odd", 416, 352, 13, 3},  // no size fits a tile
    {"odd64", 448, 320, 13, 3},
};

// Distinct experts for every token.
inline std::vector<int32_t> random_routing(const Layer& layer, int tokens, std::mt19937* random) {
  std::vector<int32_t> experts(layer.experts), ids;
  for (int e = 0; e < layer.experts; ++e) experts[e] = e;
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < layer.top_k; ++j) {
      std::swap(experts[j], experts[j + (*random)() % (layer.experts - j)]);
      ids.push_back(experts[j]);
    }
  }
  return ids;
}

inline std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::stringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

inline Layer parse_layer(const std::string& name) {
  std::string names;
  for (const Layer& layer : kLayers) {
    if (name == layer.name) return layer;
    names += " " + layer.name;
  }
  die("layer '" + name + "' is none of" + names);
}

}  // namespace jaxmoe::native

#endif  // JAXMOE_BENCHMARKS_NATIVE_HARNESS_H_
