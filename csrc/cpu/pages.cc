#include "cpu/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jaxmoe::cpu {

bool use_huge_pages(void* address, size_t bytes) {
#if defined(__linux__)
  constexpr int kMadvCollapse = 25;  // linux/mman.h, too new for some C libraries' headers
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes) & ~(kHugePage - 1);
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, kMadvCollapse) == 0;
#else
  (void)address;
  (void)bytes;
  return false;
#endif
}

}  // namespace jaxmoe::cpu
