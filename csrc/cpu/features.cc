#include "cpu/features.h"

#include <algorithm>
#include <array>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxmoe::cpu {
namespace {

#if defined(__x86_64__)

constexpr uint64_t kXcr0Avx = 0x6;          // XMM, YMM
constexpr uint64_t kXcr0Avx512 = 0xe6;      // and opmask, ZMM halves
constexpr uint64_t kXcr0Amx = 0x60000;      // XTILECFG, XTILEDATA
constexpr long kArchReqXcompPerm = 0x1023;  // asm/prctl.h: ARCH_REQ_XCOMP_PERM
constexpr unsigned long kXfeatureTileData = 18;

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

uint64_t read_xcr0() {
  unsigned eax, edx;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<uint64_t>(edx) << 32) | eax;
}

// Linux hands out the 8 KB tile state on request, once per process; without it the first tile
// instruction faults.
bool request_tile_permission() {
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

std::vector<std::string> detect() {
  std::vector<std::string> found;
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const auto bit = [](unsigned reg, int index) { return ((reg >> index) & 1) != 0; };
  if (!bit(leaf1.ecx, 27)) return found;  // OSXSAVE
  const uint64_t xcr0 = read_xcr0();
  const bool avx = (xcr0 & kXcr0Avx) == kXcr0Avx && bit(leaf1.ecx, 28);
  const bool avx512 = avx && (xcr0 & kXcr0Avx512) == kXcr0Avx512 && bit(leaf7.ebx, 16);
  const bool tiles = avx512 && (xcr0 & kXcr0Amx) == kXcr0Amx && bit(leaf7.edx, 24);
  const auto add = [&](bool present, const char* name) {
    if (present) found.push_back(name);
  };
  add(avx && bit(leaf7.ebx, 5), "avx2");
  add(avx && bit(leaf1.ecx, 12), "fma");
  add(avx && bit(leaf1.ecx, 29), "f16c");
  add(avx && bit(leaf7_1.eax, 4), "avx_vnni");
  add(avx512, "avx512f");
  add(avx512 && bit(leaf7.ebx, 30), "avx512bw");
  add(avx512 && bit(leaf7.ebx, 31), "avx512vl");
  add(avx512 && bit(leaf7.ebx, 17), "avx512dq");
  add(avx512 && bit(leaf7.ecx, 1), "avx512vbmi");
  add(avx512 && bit(leaf7.ecx, 11), "avx512_vnni");
  add(avx512 && bit(leaf7_1.eax, 5), "avx512_bf16");
  add(avx512 && bit(leaf7.edx, 23), "avx512_fp16");
  if (tiles && request_tile_permission()) {
    found.push_back("amx_tile");
    add(bit(leaf7.edx, 22), "amx_bf16");
  }
  return found;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

std::array<std::vector<std::string>, kNumVariants> make_requirements() {
  const std::vector<std::string> avx2 = {"avx2", "fma", "f16c"};
  const std::vector<std::string> avx512 = {"avx512f",  "avx512bw", "avx512vl",
                                           "avx512dq", "fma",      "f16c"};
  std::vector<std::string> avx_vnni = avx2, avx512_vnni = avx512;
  avx_vnni.push_back("avx_vnni");
  avx512_vnni.push_back("avx512_vnni");
  std::vector<std::string> avx512_bf16 = avx512_vnni;
  avx512_bf16.insert(avx512_bf16.end(), {"avx512vbmi", "avx512_bf16"});
  std::vector<std::string> amx = avx512_bf16;
  amx.insert(amx.end(), {"avx512_fp16", "amx_tile", "amx_bf16"});
  return {{{}, avx2, avx_vnni, avx512, avx512_vnni, avx512_bf16, amx}};
}

}  // namespace

const std::vector<std::string>& cpu_features() {
  static const std::vector<std::string> features = detect();
  return features;
}

const std::vector<std::string>& required_features(Variant variant) {
  static const auto requirements = make_requirements();
  return requirements[static_cast<size_t>(variant)];
}

std::vector<Variant> built_variants() {
#if defined(__x86_64__)
  return {Variant::kAmx,     Variant::kAvx512Bf16, Variant::kAvx512Vnni, Variant::kAvx512,
          Variant::kAvxVnni, Variant::kAvx2,       Variant::kPortable};
#else
  return {Variant::kPortable};
#endif
}

std::string why_not(Variant variant) {
  const std::string name = variant_name(variant);
  const std::vector<Variant> built = built_variants();
  if (std::find(built.begin(), built.end(), variant) == built.end()) {
    return name + " is not built for this processor architecture";
  }
  const std::vector<std::string>& have = cpu_features();
  std::string missing;
  for (const std::string& feature : required_features(variant)) {
    if (std::find(have.begin(), have.end(), feature) == have.end()) missing += " " + feature;
  }
  return missing.empty() ? "" : name + " needs CPU features that this machine lacks:" + missing;
}

}  // namespace jaxmoe::cpu
