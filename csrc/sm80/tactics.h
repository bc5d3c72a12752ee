// The tactics of the library for every SM from 80 on.
#ifndef JAXMOE_CSRC_SM80_TACTICS_H_
#define JAXMOE_CSRC_SM80_TACTICS_H_

#include "cuda/tactics.h"

namespace jaxmoe::sm80 {

using namespace cuda;  // the layout, the arguments and the driver are those of several families

extern const Tactic kDecode;
extern const Tactic kSmall;
extern const Tactic kMedium;
extern const Tactic kLarge;

extern const Family kFamily;

}  // namespace jaxmoe::sm80

#endif  // JAXMOE_CSRC_SM80_TACTICS_H_
