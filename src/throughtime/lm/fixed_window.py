"""A feed-forward model that sees a fixed number of tokens (Bengio et al., 2003): what a recurrent network is to be compared with.

    h_t = tanh(Σ_k W_k x_{t−k} + b),    k = 0 … n−1

where x is a token's embedding, or one-hot. What lies further back than n tokens makes no difference, however much there is to
learn from it. Before the first token stands nothing, a zero vector.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as rows_of
from torch.nn.functional import linear

from throughtime.shapes import Lengths, Outputs, TokenIds


class FixedWindow(nn.Module):
    """Hidden layers over the last n tokens, called as a recurrent layer is; its state is the last n−1 tokens.

    Args:
        vocabulary_size: V.
        input_size: Width of the embedding it is given, or V where it is given none.
        hidden_size: H.
        num_layers: L; those after the first read the one below, at the same step.
        window: n.
        dropout: Probability of dropping an input of any layer but the first, while training.

    Example:
        >>> import torch
        >>> layer = FixedWindow(vocabulary_size=65, input_size=65, hidden_size=16, window=4)
        >>> output, state = layer(torch.zeros(20, 3, dtype=torch.int64))
        >>> output.shape, state.shape  # (T, B, H), (n − 1, B)
        (torch.Size([20, 3, 16]), torch.Size([3, 3]))
    """

    def __init__(
        self,
        vocabulary_size: int,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        window: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.window = window
        self.weight = nn.Parameter(torch.empty(window, input_size, hidden_size))  # W_kᵀ
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.above = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.dropout = nn.Dropout(dropout)
        # Each pre-activation has variance 1, as one row a token, or E numbers a token, are summed over the window.
        summed = window if input_size == vocabulary_size else window * input_size
        nn.init.normal_(self.weight, std=summed**-0.5)

    def forward(
        self,
        ids: TokenIds,
        state: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Outputs, Tensor]:
        """Return h (T, B, H) and the state.

        Args:
            ids: Token ids (T, B).
            state: The n−1 tokens before, each plus one, int64 (n−1, B); 0 is none, and so is the whole state if not given.
            lengths: Makes no difference: what is past a row's end comes after it.
            embedding: (V, I); one-hot input if not given.
        """
        steps, rows = ids.shape
        if state is None:
            state = ids.new_zeros(self.window - 1, rows)
        seen = torch.cat([state, ids + 1])  # 0 is nothing
        if embedding is None:
            h = sum(self._one_hot(seen, lag, steps) for lag in range(self.window))
        else:
            x = rows_of(seen, torch.cat([embedding.new_zeros(1, embedding.shape[1]), embedding]))  # (n−1+T, B, I)
            windows = x.unfold(0, self.window, 1).flatten(2)  # (T, B, I·n), oldest first
            h = linear(windows, self.weight.flip(0).permute(2, 1, 0).flatten(1))
        h = torch.tanh(h + self.bias)
        for layer in self.above:
            h = torch.tanh(layer(self.dropout(h)))
        return h, seen[steps:]

    def _one_hot(self, seen: Tensor, lag: int, steps: int) -> Tensor:
        """Return W_k x_{t−k} of every step, a row of W_k where there is a token."""
        tokens = seen[self.window - 1 - lag : self.window - 1 - lag + steps]
        return rows_of((tokens - 1).clamp_min(0), self.weight[lag]) * (tokens > 0).unsqueeze(-1)
