"""The language model: tokens in, a recurrent stack (or a fixed window), logits of the next token out."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as embed
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from throughtime import init
from throughtime.errors import InputError, unknown_name
from throughtime.layers import GRU, LSTM, RNN, Recurrent
from throughtime.lm.dropout import Dropout, LockedDropout, LockedStack, embedding_mask
from throughtime.lm.fixed_window import FixedWindow
from throughtime.lm.kinds import settled
from throughtime.lm.loss import linear_cross_entropy
from throughtime.lm.options import ABOUT, AT_LEAST_1, REGULARISATION, flag
from throughtime.shapes import Lengths, Logits, Outputs, TokenIds

State = tuple[Tensor, ...]


def cell_names() -> list[str]:
    """Return the cells that a language model can be made of."""
    return ["rnn", "rnn_relu", "lstm", "gru", "mlp"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a language model.

    Attributes:
        vocabulary_size: V.
        cell: One of `cell_names()`.
        hidden_size: H of every layer.
        num_layers: L.
        embedding_size: Width of the token embedding; 0 feeds one-hot vectors.
        dropout: Probability of dropping an input of any layer but the first, and of the output layer, while training.
        window: How many tokens the cell "mlp" sees; the others see all of them.
        locked: Whether dropout holds still: the same units are dropped at every step of a window, inputs of the first layer
            included where there is an embedding.
        embedding_dropout: Probability of dropping a token's embedding, wherever the token occurs in a window.
        tied: Whether the output layer's weights are the embedding's (Press & Wolf, 2017). Where `embedding_size` differs
            from `hidden_size`, h is first projected to the embedding's width.
        weight_drop: Probability of dropping an element of W_hh, the same in all of a window, while training (Merity et al., 2018).
        recurrent_dropout: Probability of hiding a unit of h from W_hh, the same in all of a window, while training.
        zoneout: Probability with which a unit of the state keeps its old value in a step, while training.
        layer_norm: Whether W_ih x, W_hh h and an LSTM's c are normalised, see `throughtime.LSTM`.
        ar: α of `LanguageModel.loss`.
        tar: β of `LanguageModel.loss`.

    Raises:
        InputError: A size, a name or a combination can't be.
    """

    vocabulary_size: int
    cell: str = "lstm"
    hidden_size: int = 256
    num_layers: int = 1
    embedding_size: int = 0
    dropout: float = 0.0
    tied: bool = False
    window: int = 8
    locked: bool = False
    embedding_dropout: float = 0.0
    weight_drop: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    layer_norm: bool = False
    ar: float = 0.0
    tar: float = 0.0

    def __post_init__(self) -> None:
        if self.cell not in cell_names():
            raise unknown_name("cell", self.cell, cell_names())
        for each in fields(self):
            object.__setattr__(self, each.name, settled(each.name, getattr(self, each.name), each.type))
        AT_LEAST_1.check("vocabulary_size", self.vocabulary_size)
        for option, field in OPTIONS_OF_SHAPE.items():
            if (allowed := ABOUT[option].range) is not None:
                allowed.check(field, getattr(self, field))
        if self.embedding_dropout and not self.embedding_size:
            raise InputError("--embedding-dropout needs an embedding; add --embedding, for example --embedding 128")
        for name in ("weight_drop", "recurrent_dropout", "zoneout", "layer_norm"):
            if getattr(self, name) and self.cell == "mlp":
                raise InputError(
                    f"{flag(name)} is for recurrent layers, and --cell mlp has none; leave one of them out"
                )
        if self.tied and not self.embedding_size:
            raise InputError("--tied needs an embedding to share; add --embedding, for example --embedding 128")

    @property
    def parameter_count(self) -> int:
        """How many weights a model of this shape has, told without making it; shared ones count once.

        Example:
            >>> config = ModelConfig(vocabulary_size=65, hidden_size=16, tied=True, embedding_size=8)
            >>> config.parameter_count == LanguageModel(config).parameter_count
            True
        """
        vocabulary, hidden = self.vocabulary_size, self.hidden_size
        inputs = self.embedding_size or vocabulary
        above = self.num_layers - 1
        if self.cell == "mlp":
            stack = self.window * inputs * hidden + hidden + above * (hidden + 1) * hidden
        else:
            rows = _GATES[self.cell] * hidden
            gains = (2 * rows + (2 * hidden if self.cell == "lstm" else 0)) if self.layer_norm else 0
            stack = rows * (inputs + hidden + 2) + gains + above * (rows * (2 * hidden + 2) + gains)
        embedding = vocabulary * self.embedding_size
        if not self.tied:
            return embedding + stack + (hidden + 1) * vocabulary
        projection = hidden * inputs if hidden != inputs else 0
        return embedding + stack + projection + vocabulary

    def describe(self) -> str:
        """Return the shape in a line, as a reader wants it.

        Example:
            >>> ModelConfig(vocabulary_size=65, hidden_size=256, dropout=0.1).describe()
            'LSTM, 1 layer of 256, one-hot input, dropout 0.1: 347,457 parameters'
        """
        parts = [
            self.cell.upper().replace("_", " "),
            f"{self.num_layers} layer{'s' if self.num_layers > 1 else ''} of {self.hidden_size}",
            f"embedding {self.embedding_size}" if self.embedding_size else "one-hot input",
        ]
        if self.cell == "mlp":
            parts.append(f"a window of {self.window} tokens")
        if self.tied:
            parts.append("tied")
        if self.dropout:
            parts.append(f"dropout {self.dropout:g}" + (" locked" if self.locked else ""))
        for name, value in (
            ("embedding dropout", self.embedding_dropout),
            ("weight drop", self.weight_drop),
            ("recurrent dropout", self.recurrent_dropout),
            ("zoneout", self.zoneout),
            ("AR", self.ar),
            ("TAR", self.tar),
        ):
            if value:
                parts.append(f"{name} {value:g}")
        parts += ["layer norm"] if self.layer_norm else []
        return f"{', '.join(parts)}: {self.parameter_count:,} parameters"


_RENAMED = {"hidden": "hidden_size", "layers": "num_layers", "embedding": "embedding_size"}
# the options of training that a shape holds, and its field for each
OPTIONS_OF_SHAPE = {
    option: _RENAMED.get(option, option)
    for option in ABOUT
    if _RENAMED.get(option, option) in {field.name for field in fields(ModelConfig)}
}
# what of a shape is for training alone, so that trained weights serve any
ADJUSTABLE = tuple(name for name, about in ABOUT.items() if about.panel == REGULARISATION)
_GATES = {"rnn": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


class LanguageModel(nn.Module):
    """A recurrent language model.

    Args:
        config: Its shape.

    Example:
        >>> import torch
        >>> model = LanguageModel(ModelConfig(vocabulary_size=65, hidden_size=16))
        >>> logits, state = model(torch.zeros(20, 3, dtype=torch.int64))
        >>> logits.shape, len(state)  # (T, B, V), and an LSTM's (h, c)
        (torch.Size([20, 3, 65]), 2)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.embedding_size or config.vocabulary_size
        self.embedding = nn.Embedding(config.vocabulary_size, inputs) if config.embedding_size else None
        self.recurrent = _make_recurrent(config, inputs)
        self.dropout = LockedDropout(config.dropout) if config.locked else Dropout(config.dropout)
        width = config.hidden_size
        self.projection = None
        if config.tied:
            self.projection = nn.Linear(width, inputs, bias=False) if width != inputs else None
            width = inputs
        self.output = nn.Linear(width, config.vocabulary_size)
        self._initialise()

    def _initialise(self) -> None:
        """Start where learning is fast: docs/log.md has what was tried and what it came to."""
        nn.init.zeros_(self.output.bias)
        layers = [layer for layer in self.recurrent.modules() if isinstance(layer, Recurrent)]
        for layer in layers:
            init.orthogonal_(layer)
        if self.embedding is None and layers:  # a one-hot input picks a row, so rows are drawn as an embedding's are
            nn.init.normal_(layers[0].all_weights[0][0])
        if self.config.tied and self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=self.config.embedding_size**-0.5)
            self.output.weight = self.embedding.weight

    def draw_uniformly(self, bound: float) -> None:
        """Draw every weight from U(−bound, bound), as Zaremba et al. (2014) start."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, ids: TokenIds, state: State | None = None, lengths: Lengths | None = None
    ) -> tuple[Logits, State]:
        """Predict the token after each one.

        Args:
            ids: Token ids (T, B), int64.
            state: What the last call returned, each tensor (L, B, H), or (n−1, B) of an mlp; `None` starts anew.
            lengths: Steps in each row (B,), 0 … T, if they aren't all T; logits past a row's end mean nothing.

        Returns:
            Logits (T, B, V) and the state: (h,), (h, c) of an LSTM, the tokens an mlp still sees.
        """
        h, state = self.hidden(ids, state, lengths)
        return self.readout(self.dropout(h)), state

    def hidden(
        self, ids: TokenIds, state: State | None = None, lengths: Lengths | None = None
    ) -> tuple[Outputs, State]:
        """Return the last layer's h (T, B, H) before any dropout, and the state; arguments as of a call."""
        hx = state[0] if state is not None and len(state) == 1 else state
        embedding = self._embedding()
        if isinstance(self.recurrent, FixedWindow):
            h, final = self.recurrent(ids, hx, embedding=embedding)
        elif embedding is not None and self.config.locked and self.training:  # each row drops units of its own
            h, final = self.recurrent(self.dropout(embed(ids, embedding)), hx, lengths=lengths)
        else:
            h, final = self.recurrent(ids, hx, lengths=lengths, embedding=embedding)
        return h, final if isinstance(final, tuple) else (final,)

    reads_ids = True  # for `throughtime.stream`, as is `stages`

    def stages(self) -> list[nn.Module]:
        """Return the layers in order, without what does nothing in eval mode.

        Raises:
            InputError: It is an mlp.
        """
        if isinstance(self.recurrent, FixedWindow):
            raise InputError(
                "an mlp sees a fixed window and carries no state: it has no step; expected a model of another cell"
            )
        recurrent = self.recurrent.layers if isinstance(self.recurrent, LockedStack) else [self.recurrent]
        ends = (self.embedding, *recurrent, self.projection, self.output)
        return [module for module in ends if module is not None]

    def readout(self, h: Outputs) -> Logits:
        """Return the logits (T, B, V) of h (T, B, H)."""
        if self.projection is not None:
            h = self.projection(h)
        return linear(h, self.output.weight, self.output.bias)

    def loss(self, h: Outputs, targets: TokenIds) -> Tensor:
        """Return the mean of −ln p of targets (T, B) in nats, from what `hidden` returned; targets of −100 don't count.

        While training, α mean(ĥ²) and β mean((h_t − h_{t−1})²) are added, with ĥ what dropout leaves of h and means over units and
        the steps that count: activation regularisation and its temporal kind (AR and TAR; Merity et al., 2017).
        """
        raw, h = h, self.dropout(h)
        penalty = self._penalty(raw, h, targets >= 0) if self.training else 0.0
        if self.projection is not None:
            h = self.projection(h)
        return linear_cross_entropy(h.flatten(0, 1), self.output.weight, self.output.bias, targets.flatten()) + penalty

    def _penalty(self, raw: Outputs, dropped: Outputs, counts: Tensor) -> Tensor | float:
        penalty = 0.0
        if self.config.ar:
            penalty = penalty + self.config.ar * _mean_square(dropped, counts)
        if self.config.tar:
            penalty = penalty + self.config.tar * _mean_square(raw.diff(dim=0), counts[1:])
        return penalty

    def _embedding(self) -> Tensor | None:
        """Return the embedding (V, E), some rows dropped while training."""
        if self.embedding is None:
            return None
        weight, p = self.embedding.weight, self.config.embedding_dropout
        return weight * embedding_mask(len(weight), p, weight) if p and self.training else weight

    @property
    def parameter_count(self) -> int:
        """How many weights there are; shared ones count once."""
        return sum(p.numel() for p in self.parameters())


def outline(config: ModelConfig) -> LanguageModel:
    """Return a model on torch's meta device: its weights have names, shapes and dtypes, but take no memory and aren't drawn."""
    with torch.device("meta"), _Undrawn():
        return LanguageModel(config)


class _Undrawn(TorchFunctionMode):
    """Leaves out what draws normal numbers: on the meta device, torch imports its compiler for that, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _mean_square(x: Tensor, counts: Tensor) -> Tensor:
    """Return the mean square of x (T, B, H) over the steps (T, B) that count, 0 if none does."""
    return (x.float().square().mean(-1) * counts).sum() / counts.sum().clamp_min(1)


def _make_recurrent(config: ModelConfig, inputs: int) -> Recurrent | LockedStack | FixedWindow:
    dropout = config.dropout if config.num_layers > 1 else 0.0
    if config.cell == "mlp":
        sizes = config.vocabulary_size, inputs, config.hidden_size, config.num_layers, config.window
        return FixedWindow(*sizes, dropout)
    if config.locked and dropout:
        widths = [inputs, *[config.hidden_size] * (config.num_layers - 1)]
        return LockedStack([_make_layers(config, width, 1, 0.0) for width in widths], dropout)
    return _make_layers(config, inputs, config.num_layers, dropout)


def _make_layers(config: ModelConfig, inputs: int, num_layers: int, dropout: float) -> Recurrent:
    sizes = inputs, config.hidden_size, num_layers
    options: dict[str, Any] = {
        "dropout": dropout,
        "layer_norm": config.layer_norm,
        "zoneout": config.zoneout,
        "recurrent_dropout": config.recurrent_dropout,
        "weight_drop": config.weight_drop,
    }
    if config.cell == "lstm":
        return LSTM(*sizes, **options)
    if config.cell == "gru":
        return GRU(*sizes, **options)
    return RNN(*sizes, nonlinearity="relu" if config.cell == "rnn_relu" else "tanh", **options)


def device_named(name: str) -> torch.device:
    """Return the device of a name; "auto" takes a GPU where there is one.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("nothing can be computed there")
    except (RuntimeError, AssertionError) as error:
        here = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise InputError(f"--device {name}: can't be used here; expected one of {', '.join(here)}") from error
    return device
