"""One word, worked through: its one-hot recurrent network, forward, backward through time, and trained until it spells the word.

The network reads the word's letters one at a time and predicts the next one; its vocabulary is the word's distinct letters,
it has no biases, and h_0 = 0. For t = 1 … T, T = letters − 1:

    h_t = tanh(W_xh x_t + W_hh h_{t−1})                       hidden state
    y_t = W_hy h_t                                            output
    p_t = softmax(y_t)                                        probability of each letter
    L_t = −ln p_t[target],  L = Σ_t L_t                       loss
    ∂L/∂W_hh = Σ_t ∂L_t/∂W_hh                                 backpropagation through time
    ∂L_t/∂W_hh = Σ_{k≤t} ∂L_t/∂h_k ⊙ (1 − h_k²) · h_{k−1}ᵀ    each loss reaches back over the steps k before it
    g ← g · min(1, c/‖g‖)                                     clipping by the global norm (Pascanu et al., 2013)
    W ← W − η g                                               one update of gradient descent

The steps themselves are `throughtime.cells`; everything is float64.
"""

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, one_hot
from torch.nn.utils import get_total_norm

from throughtime.cells import CELLS, Parameters, readout, sequence
from throughtime.errors import InputError

LONGEST = 64  # letters worked through: training on more takes longer than a reader waits

_CELL = CELLS["rnn_tanh"]


class Weights(NamedTuple):
    """The three matrices, or their gradients."""

    xh: Float[Tensor, "H V"]
    hh: Float[Tensor, "H H"]
    hy: Float[Tensor, "V H"]


@dataclass(frozen=True)
class Word:
    """A word as the network sees it.

    Attributes:
        letters: The word in Unicode's composed form (NFC), so that a Korean syllable is one letter however it was typed; of a
            word longer than `LONGEST`, its beginning.
        given: How many letters were given.
        vocabulary: Its distinct letters in order of appearance.
        ids: The index of each letter in the vocabulary.
    """

    letters: str
    given: int
    vocabulary: tuple[str, ...]
    ids: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> "Word":
        """Read a word.

        Raises:
            InputError: It has fewer than two letters, or fewer than two distinct ones.
        """
        composed = unicodedata.normalize("NFC", text)
        letters = composed[:LONGEST]
        vocabulary = tuple(dict.fromkeys(letters))
        wanted = "the network reads one letter and predicts the next; give a word such as ybigta"
        if len(letters) < 2:
            count = "one letter" if letters else "no letters"
            raise InputError(f"{letters!r} has {count}; expected two or more: {wanted}")
        if len(vocabulary) < 2:
            raise InputError(f"{_abbreviated(letters)!r} has one distinct letter; expected two or more: {wanted}")
        return cls(letters, len(composed), vocabulary, tuple(vocabulary.index(letter) for letter in letters))

    @property
    def steps(self) -> int:
        """T: each letter but the last is an input."""
        return len(self.letters) - 1

    @property
    def inputs(self) -> Float[Tensor, "T 1 V"]:
        """x_t, one-hot."""
        return one_hot(torch.tensor(self.ids[:-1]), len(self.vocabulary)).double()[:, None]

    @property
    def targets(self) -> Int[Tensor, "T"]:
        """The index of the letter that follows, for each step."""
        return torch.tensor(self.ids[1:])

    @property
    def followers(self) -> dict[str, tuple[str, ...]]:
        """The letters that follow each letter. Where there are several, only memory of what came before can tell which."""
        return {
            letter: tuple(dict.fromkeys(b for a, b in zip(self.letters, self.letters[1:], strict=False) if a == letter))
            for letter in dict.fromkeys(self.letters[:-1])
        }


class Forward(NamedTuple):
    """A forward pass, every number of it, one row per step."""

    from_input: Float[Tensor, "T H"]  # W_xh x_t
    from_state: Float[Tensor, "T H"]  # W_hh h_{t−1}
    h: Float[Tensor, "T H"]
    y: Float[Tensor, "T V"]
    p: Float[Tensor, "T V"]
    losses: Float[Tensor, "T"]  # nats


class Backward(NamedTuple):
    """Backpropagation through time, taken apart by loss and put together again in three ways.

    `per_step[t]` is ∂L_t/∂W_hh, found by sending the loss of step t alone back through time. Their sum must equal `gradient.hh`,
    the one backward pass that training takes, and `autograd.hh`, torch's own.
    """

    per_step: Float[Tensor, "T H H"]
    reach: Float[Tensor, "T T"]  # ‖∂L_t/∂h_k‖ at [t, k]; zero for k > t
    gradient: Weights
    autograd: Weights

    @property
    def total(self) -> Float[Tensor, "H H"]:
        """Σ_t ∂L_t/∂W_hh."""
        return self.per_step.sum(0)

    @property
    def discrepancy(self) -> float:
        """The largest difference between the sum, the one pass and autograd, over all three matrices; rounding only."""
        differences = [self.total - self.autograd.hh]
        differences += [a - b for a, b in zip(self.gradient, self.autograd, strict=True)]
        return max(float(difference.abs().max()) for difference in differences)


class StepBack(NamedTuple):
    """One step of the backward pass, every number of it: from step t to t − 1.

    Attributes:
        y: ∂L_t/∂y_t = p_t − the target's one-hot vector.
        own: W_hyᵀ ∂y_t, what the step's own loss sends into h_t.
        later: What arrives from the steps after it, W_hhᵀ ∂a_{t+1}.
        h: ∂h_t, their sum.
        a: ∂a_t = ∂h_t ⊙ (1 − h_t²).
        parts: The step's part of ∂L/∂W: ∂a_t x_tᵀ, ∂a_t h_{t−1}ᵀ, ∂y_t h_tᵀ.
    """

    y: Float[Tensor, "V"]
    own: Float[Tensor, "H"]
    later: Float[Tensor, "H"]
    h: Float[Tensor, "H"]
    a: Float[Tensor, "H"]
    parts: Weights


class Update(NamedTuple):
    """One update of gradient descent.

    Attributes:
        norm: ‖g‖, the global norm over the three matrices, before clipping.
        scale: What clipping multiplies g by: min(1, c/‖g‖), 1 where c is 0 (off).
        gradient: g after clipping.
        weights: W − η g.
    """

    norm: float
    scale: float
    gradient: Weights
    weights: Weights


class Progress(NamedTuple):
    """The network after `updates` updates: its loss (nats, summed over the word), its gradient's norm, and how it spells."""

    updates: int
    loss: float
    norm: float
    clipped: bool
    spelled: str


@dataclass(frozen=True)
class Descent:
    """How the weights move: the learning rate η and the clipping norm c (0: no clipping)."""

    learning_rate: float = 0.2
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"--lr {self.learning_rate:g}: expected a number above 0, such as 0.2")
        if not (math.isfinite(self.clip) and self.clip >= 0):
            raise InputError(
                f"--clip {self.clip:g}: expected the largest gradient norm let through, or 0 for no clipping"
            )

    def update(self, weights: Weights, gradient: Weights) -> Update:
        """Return W − η g, g clipped to the global norm c."""
        norm = float(get_total_norm(list(gradient)))
        scale = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        clipped = Weights(*(g * scale for g in gradient))
        return Update(
            norm, scale, clipped, Weights(*(w - self.learning_rate * g for w, g in zip(weights, clipped, strict=True)))
        )


def usual_hidden_size(word: Word) -> int:
    """Return H: 3 for a short word, as in the textbooks; half the letters of a longer one, which has more to remember."""
    return max(3, -(-len(word.letters) // 2))


def initial_weights(word: Word, hidden_size: int, seed: int = 1) -> Weights:
    """Draw the weights as torch.nn.RNN does, uniformly from ±1/√H.

    Raises:
        InputError: `hidden_size` isn't between 1 and 256.
    """
    if not 1 <= hidden_size <= 256:
        raise InputError(f"--hidden {hidden_size}: expected a whole number from 1 to 256")
    generator = torch.Generator().manual_seed(seed)
    bound, size = 1 / math.sqrt(hidden_size), len(word.vocabulary)
    shapes = ((hidden_size, size), (hidden_size, hidden_size), (size, hidden_size))
    return Weights(*(bound * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) for shape in shapes))


def forward(word: Word, weights: Weights) -> Forward:
    """Run the network over the word.

    Example:
        >>> word = Word.read("ybigta")
        >>> result = forward(word, initial_weights(word, hidden_size=3))
        >>> result.h.shape, result.p.shape  # five steps, three hidden units, six letters
        (torch.Size([5, 3]), torch.Size([5, 6]))
        >>> bool(torch.allclose(result.h, (result.from_input + result.from_state).tanh()))
        True
    """
    result = sequence.forward(_CELL, word.inputs, _no_state(weights), _recurrent(weights))
    h = result.outputs[:, 0]
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    y, losses, p = [], [], []
    for h_t, target in zip(result.outputs, word.targets, strict=True):
        y_t, loss, saved = readout.step(h_t, weights.hy, None, target[None])
        y.append(y_t[0])
        losses.append(loss)
        p.append(saved.p[0])
    return Forward(
        linear(word.inputs[:, 0], weights.xh),
        linear(before, weights.hh),
        h,
        torch.stack(y),
        torch.stack(p),
        torch.stack(losses),
    )


def gradient(word: Word, weights: Weights) -> tuple[Weights, float]:
    """Backpropagate the word's loss through time in one pass: return (∂L/∂W, L)."""
    result = sequence.forward(_CELL, word.inputs, _no_state(weights), _recurrent(weights))
    grad_h, grad_hy, total = [], torch.zeros_like(weights.hy), 0.0
    for h_t, target in zip(result.outputs, word.targets, strict=True):
        _, loss, saved = readout.step(h_t, weights.hy, None, target[None])
        from_loss = readout.step_backward(torch.ones_like(loss), saved, weights.hy, None)
        grad_h.append(from_loss.h)
        grad_hy = grad_hy + from_loss.weight
        total += float(loss)
    through_time = sequence.backward(
        _CELL, torch.stack(grad_h), _no_state(weights), result.saved, _recurrent(weights)
    ).parameters
    return Weights(through_time.weight_ih, through_time.weight_hh, grad_hy), total


def backward(word: Word, weights: Weights) -> Backward:
    """Send each step's loss back through time on its own; also backpropagate all at once, by hand and by torch.autograd.

    Example:
        >>> word = Word.read("ybigta")
        >>> result = backward(word, initial_weights(word, hidden_size=3))
        >>> result.per_step.shape  # ∂L_t/∂W_hh for t = 1 … 5
        torch.Size([5, 3, 3])
        >>> result.discrepancy < 1e-12  # Σ_t ∂L_t/∂W_hh is the gradient
        True
    """
    result = sequence.forward(_CELL, word.inputs, _no_state(weights), _recurrent(weights))
    reach = torch.zeros(word.steps, word.steps, dtype=torch.float64)
    per_step = []
    for t, (h_t, target) in enumerate(zip(result.outputs, word.targets, strict=True)):
        _, loss, saved = readout.step(h_t, weights.hy, None, target[None])
        grad_h = readout.step_backward(torch.ones_like(loss), saved, weights.hy, None).h
        grad_hh = torch.zeros_like(weights.hh)
        for k in range(t, -1, -1):
            reach[t, k] = torch.linalg.vector_norm(grad_h)
            step = _CELL.step_backward((grad_h,), result.saved[k], _recurrent(weights))
            grad_hh = grad_hh + step.parameters.weight_hh
            (grad_h,) = step.state
        per_step.append(grad_hh)
    return Backward(torch.stack(per_step), reach, gradient(word, weights)[0], _autograd(word, weights))


def steps_back(word: Word, weights: Weights) -> list[StepBack]:
    """Backpropagate the word's loss step by step; return the steps in order of t, though the last one is taken first.

    Example:
        >>> word = Word.read("ybigta")
        >>> weights = initial_weights(word, hidden_size=3)
        >>> steps = steps_back(word, weights)
        >>> bool(torch.allclose(sum(step.parts.hh for step in steps), backward(word, weights).gradient.hh))
        True
        >>> steps[-1].later.tolist()  # nothing comes after the last step
        [0.0, 0.0, 0.0]
    """
    assert _CELL.linearise is not None
    result = sequence.forward(_CELL, word.inputs, _no_state(weights), _recurrent(weights))
    later, steps = _no_state(weights)[0], []
    for t in range(word.steps - 1, -1, -1):
        _, loss, read = readout.step(result.outputs[t], weights.hy, None, word.targets[t][None])
        from_loss = readout.step_backward(torch.ones_like(loss), read, weights.hy, None)
        y = read.p - one_hot(read.target, read.p.shape[1])
        h = from_loss.h + later
        (to_a,), *_ = _CELL.linearise(result.saved[t])
        gradient = _CELL.step_backward((h,), result.saved[t], _recurrent(weights))
        parts = Weights(gradient.parameters.weight_ih, gradient.parameters.weight_hh, from_loss.weight)
        a = h * to_a[:, 0]
        steps.append(StepBack(y[0], from_loss.h[0], later[0], h[0], a[0], parts))
        (later,) = gradient.state
    return steps[::-1]


def spell(word: Word, weights: Weights) -> str:
    """Let the network write: give it the word's first letter, then each time the letter it found most probable."""
    state, letter = _no_state(weights), word.ids[0]
    written = [letter]
    for _ in range(word.steps):
        x = one_hot(torch.tensor([letter]), len(word.vocabulary)).double()
        state, _saved = _CELL.step(x, state, _recurrent(weights))
        letter = int(linear(state[0], weights.hy).argmax())
        written.append(letter)
    return "".join(word.vocabulary[letter] for letter in written)


def train(word: Word, weights: Weights, descent: Descent, at_most: int = 2000) -> Iterator[Progress]:
    """Repeat the one update until the network spells the word, or `at_most` times; yield where it stands before each.

    Raises:
        InputError: The loss is no longer finite: the learning rate is too large.

    Example:
        >>> word = Word.read("ybigta")
        >>> *_, last = train(word, initial_weights(word, hidden_size=3), Descent())
        >>> last.spelled
        'ybigta'
    """
    for updates in range(at_most + 1):
        grad, loss = gradient(word, weights)
        if not math.isfinite(loss):
            raise InputError(
                f"--lr {descent.learning_rate:g}: the loss isn't finite after {updates} updates; give a smaller one"
            )
        update = descent.update(weights, grad)
        spelled = spell(word, weights)
        yield Progress(updates, loss, update.norm, update.scale < 1, spelled)
        if spelled == word.letters:
            return
        weights = update.weights


def _abbreviated(letters: str) -> str:
    return letters if len(letters) <= 16 else letters[:15] + "…"


def _recurrent(weights: Weights) -> Parameters:
    return Parameters(weight_ih=weights.xh, weight_hh=weights.hh)


def _no_state(weights: Weights) -> tuple[Tensor]:
    return (weights.hh.new_zeros(1, weights.hh.shape[0]),)


def _autograd(word: Word, weights: Weights) -> Weights:
    """Return ∂L/∂W as torch.autograd finds it, from the forward equations alone."""
    leaves = Weights(*(w.detach().clone().requires_grad_() for w in weights))
    h, loss = _no_state(weights)[0], weights.hh.new_zeros(())
    for x, target in zip(word.inputs, word.targets, strict=True):
        h = torch.tanh(x @ leaves.xh.T + h @ leaves.hh.T)
        loss = loss + torch.nn.functional.cross_entropy(h @ leaves.hy.T, target[None])
    return Weights(*torch.autograd.grad(loss, leaves))
