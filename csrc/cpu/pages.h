// Pages of the weights.
#ifndef JAXMOE_CSRC_CPU_PAGES_H_
#define JAXMOE_CSRC_CPU_PAGES_H_

#include <cstddef>

namespace jaxmoe::cpu {

// Asks the system to put the whole huge pages inside [address, address + bytes) on huge pages now,
// which copies them once; the contents stay as they are, also for who reads them meanwhile.
// Streaming weights from 4 KB pages is slower by 10 to 25 %. False where the system does not do it
// (it takes Linux 6.1); nothing depends on it but speed.
bool use_huge_pages(void* address, size_t bytes);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_PAGES_H_
