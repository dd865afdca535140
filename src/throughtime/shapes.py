"""The axis legend, and names for the arrays that travel between modules.

| axis | what |
|---|---|
| T | time steps |
| B | batch rows |
| I | input width |
| H | hidden width |
| P | width of h: H, or `proj_size` where an LSTM projects it |
| G | gates: 1 RNN, 3 GRU, 4 LSTM |
| L | layers |
| V | vocabulary |
| K | lag, in steps |

The aliases are jaxtyping annotations: documentation always, and checked at every call while the test suite runs.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

StepInput = Float[Tensor, "B I"]
StepHidden = Float[Tensor, "B P"]
StepCell = Float[Tensor, "B H"]
StepState = tuple[Tensor, ...]  # (h,) of shape (B, P), or (h, c) with c (B, H)

Inputs = Float[Tensor, "T B I"]
Outputs = Float[Tensor, "T B P"]

Lengths = Int[Tensor, "B"]
Reset = Bool[Tensor, "T B"]

TokenIds = Int[Tensor, "T B"]
Logits = Float[Tensor, "T B V"]
