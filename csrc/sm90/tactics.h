// The tactics of the Hopper library.
#ifndef JAXMOE_CSRC_SM90_TACTICS_H_
#define JAXMOE_CSRC_SM90_TACTICS_H_

#include "cuda/tactics.h"

namespace jaxmoe::sm90 {

using namespace cuda;  // the layout, the arguments and the driver are those of several families

extern const Tactic kFused;
extern const Tactic kDecode;
extern const Tactic kWgmma64;
extern const Tactic kWgmma64Tall;
extern const Tactic kWgmma128;
extern const Tactic kWgmma192;
extern const Tactic kWgmma256;

extern const Family kFamily;

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_TACTICS_H_
