// Every cell, each on a page of its own: a new one is a page, and its line here.
#pragma once

#include "cells/gru.h"
#include "cells/gru_reset_before.h"
#include "cells/lstm.h"
#include "cells/mgu.h"
#include "cells/rnn.h"

namespace throughtime::THROUGHTIME_ISA {

template <class E, template <class...> class Of>
using EachCell = Of<RnnTanhPage<E>, RnnReluPage<E>, LstmPage<E>, GruPage<E>, GruResetBeforePage<E>, MguPage<E>>;

}  // namespace throughtime::THROUGHTIME_ISA
