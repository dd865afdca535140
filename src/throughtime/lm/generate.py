"""Text from a language model: sampled token by token, or the likeliest by beam search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from throughtime.errors import InputError
from throughtime.lm.bpe import BpeTokenizer
from throughtime.lm.model import LanguageModel
from throughtime.lm.tokenizer import ByteTokenizer, Decoder, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Logits are first changed by the penalties, then by the temperature; the tokens to choose among are those that every given limit
    leaves, each limit applied to what the ones before it left.

    Attributes:
        temperature: Logits are divided by it: below 1 is safer, above 1 wilder.
        top_k: Only the k likeliest tokens.
        top_p: Only the likeliest tokens that together have this probability (Holtzman et al., 2020).
        min_p: Only tokens at least this many times as likely as the likeliest (Nguyen et al., 2024).
        typical_p: Only the tokens whose −ln p is nearest to its mean, that together have this probability (Meister et al., 2023).
        repetition_penalty: Logits of tokens that occurred are divided by it where positive and multiplied where negative (Keskar et
            al., 2019); 1 is off.
        no_repeat_ngram: No n tokens in a row occur twice, the prompt included; 0 is off.
        greedy: Always the likeliest token.

    Raises:
        InputError: A value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"--temperature {self.temperature}: expected a number above 0; for the likeliest token, --greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k}: expected at least 1")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected a probability above 0, at most 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"--repetition-penalty {self.repetition_penalty}: expected a number above 0; 1 is off")
        if self.no_repeat_ngram < 0:
            raise InputError(f"--no-repeat-ngram {self.no_repeat_ngram}: expected a number of tokens, or 0 for off")

    def choose(self, logits: Tensor, generator: torch.Generator, history: Sequence[int] = ()) -> int | None:
        """Choose a token.

        Args:
            logits: (V,); what must not be chosen has −inf.
            generator: Where chance comes from.
            history: The tokens so far.

        Returns:
            The token, or `None` if all are forbidden.
        """
        logits = self._penalised(logits, history)
        if bool(torch.isneginf(logits).all()):
            return None
        if self.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(self._limited(logits / self.temperature), 1, generator=generator))

    def _penalised(self, logits: Tensor, history: Sequence[int]) -> Tensor:
        if self.repetition_penalty != 1 and len(history):
            seen = torch.tensor(sorted(set(history)))
            before = logits[seen]
            penalty = self.repetition_penalty
            logits = logits.index_copy(0, seen, torch.where(before > 0, before / penalty, before * penalty))
        forbidden = _completions(history, self.no_repeat_ngram) if self.no_repeat_ngram else []
        return logits.index_fill(0, torch.tensor(forbidden), -torch.inf) if forbidden else logits

    def _limited(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the tokens that the limits leave, not normalised."""
        if self.top_k is not None and self.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -torch.inf)
        p = logits.softmax(0)
        if self.top_p is not None:
            p = _first_of(p, -p, self.top_p)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p.max(), 0)
        if self.typical_p is not None:
            p = p / p.sum()
            surprise = -p.clamp_min(torch.finfo(p.dtype).tiny).log()
            p = _first_of(p, (surprise - (p * surprise).sum()).abs(), self.typical_p)
        return p


def _first_of(p: Tensor, order: Tensor, mass: float) -> Tensor:
    """Keep the tokens that come first by `order` and together have the probability; the one that reaches it is still in."""
    places = order.masked_fill(p == 0, torch.inf).argsort(stable=True)
    sorted_p = p[places] / p.sum()
    beyond = sorted_p.cumsum(0) - sorted_p >= mass
    return p.index_fill(0, places[beyond], 0)


def _completions(history: Sequence[int], n: int) -> list[int]:
    """Return the tokens that would make the last n tokens a repetition."""
    last = tuple(history[len(history) - n + 1 :]) if n > 1 else ()
    if len(history) < n:
        return []
    return [history[i + n - 1] for i in range(len(history) - n + 1) if tuple(history[i : i + n - 1]) == last]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
    stop: Sequence[str] = (),
    alphabet: str | None = None,
) -> Iterator[str]:
    """Continue a prompt; yield text as it comes.

    The unknown token is never chosen. A model of sequences begins one, and stops at its end. Without a prompt, a model of a
    stream starts as after a line end, or, where it knows no line end, after the last token of its vocabulary.

    Args:
        model: The language model, on any device.
        tokenizer: Its tokenizer.
        prompt: What to continue; it is not repeated. Characters unknown to the model are read as its unknown token.
        length: How many tokens to generate at most, at least 1.
        sampling: How to choose.
        seed: Makes the text reproducible.
        stop: Texts before which to stop; they are not part of what is yielded.
        alphabet: The only characters that may be generated; see `allowed_tokens`. Where penalties leave none, the text ends.

    Raises:
        InputError: `length` is below 1, a stop text is empty, or the alphabet allows nothing.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> text = "".join(generate(model, ByteTokenizer(), "To be", length=20, seed=1))
    """
    _check_length(length)
    if not all(stop):
        raise InputError("--stop '': expected a text that isn't empty")
    pieces = _generate(model, tokenizer, prompt, length, sampling, seed, _forbidden(tokenizer, alphabet))
    return _until(pieces, stop) if stop else pieces


def seed_of_sample(seed: int | None, number: int) -> int | None:
    """Return the seed of one of several samples, counted from 0, if they are to be repeatable."""
    return None if seed is None else seed + number


def allowed_tokens(tokenizer: Tokenizer, alphabet: str) -> NDArray[np.bool_]:
    """Return which tokens (V,) are written with the characters of an alphabet alone.

    The end of a sequence is allowed always, the unknown token never. At level "word", what a word is written with counts, not the
    space before it.

    Raises:
        InputError: No token is; or the alphabet goes beyond ASCII where tokens are pieces of characters.

    Example:
        >>> from throughtime.lm import CharTokenizer
        >>> allowed_tokens(CharTokenizer("abc"), "ca").tolist()
        [False, True, False, True]
    """
    if isinstance(tokenizer, ByteTokenizer | BpeTokenizer):
        if not alphabet.isascii():
            raise InputError(
                f"--alphabet {alphabet!r}: at level {tokenizer.level} a character beyond ASCII is several tokens; "
                "expected ASCII alone, or a run of level char"
            )
        wanted = set(alphabet.encode())
        allowed = [set(tokenizer.token_bytes(token)) <= wanted for token in range(tokenizer.vocabulary_size)]
    else:
        known = set(alphabet)
        allowed = [set(tokenizer.decode([token])) <= known for token in range(tokenizer.vocabulary_size)]
    mask = np.array(allowed)
    for token in (tokenizer.unknown_id, tokenizer.eos_id):
        if token is not None:
            mask[token] = False
    if not mask.any():
        raise InputError(
            f"--alphabet {alphabet!r}: no token of the run is written with these characters alone; "
            "expected some that occur in its text"
        )
    if tokenizer.eos_id is not None:
        mask[tokenizer.eos_id] = True
    return mask


def _forbidden(tokenizer: Tokenizer, alphabet: str | None) -> Tensor:
    """Return which tokens (V,) are never chosen."""
    forbidden = torch.zeros(tokenizer.vocabulary_size, dtype=torch.bool)
    if alphabet is not None:
        forbidden = ~torch.from_numpy(allowed_tokens(tokenizer, alphabet))
    if tokenizer.unknown_id is not None:
        forbidden[tokenizer.unknown_id] = True
    return forbidden


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"--length {length}: expected at least 1")


def first_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return what is read before the first token is chosen."""
    ids = tokenizer.encode(tokenizer.prompt(prompt)).tolist()
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id, *ids]
    if ids:
        return ids
    ids = tokenizer.encode("\n").tolist()
    return [tokenizer.vocabulary_size - 1] if ids == [tokenizer.unknown_id] else ids


@torch.no_grad()
def _generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    sampling: Sampling,
    seed: int | None,
    forbidden: Tensor,
) -> Iterator[str]:
    device = next(model.parameters()).device
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    history = first_ids(tokenizer, prompt)
    decoder = _primed(tokenizer, prompt)
    model.eval()
    logits, state = model(torch.tensor(history, device=device)[:, None])
    for _ in range(length):
        token = sampling.choose(_allowed(logits[-1, 0], forbidden), generator, history)
        if token is None or token == tokenizer.eos_id:
            return
        if text := decoder.push(token):
            yield text
        history.append(token)
        logits, state = model(torch.tensor([[token]], device=device), state)


def _allowed(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Return logits on the CPU in which some tokens can't be chosen."""
    return logits.float().cpu().masked_fill(forbidden, -torch.inf)


def _primed(tokenizer: Tokenizer, prompt: str) -> Decoder:
    """Return a decoder that has seen the prompt, so that it knows whether a space comes first."""
    decoder = tokenizer.decoder()
    for token in tokenizer.encode(tokenizer.prompt(prompt)).tolist():
        decoder.push(token)
    return decoder


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on up to a stop text; what may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for text in stop if (place := held.find(text)) >= 0]
        if found:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        longest = max(
            n for text in stop for n in range(min(len(text), len(held) + 1)) if n == 0 or held.endswith(text[:n])
        )
        if len(held) > longest:
            yield held[: len(held) - longest]
            held = held[len(held) - longest :]
    if held:
        yield held


@dataclass(frozen=True)
class Beam:
    """A continuation that beam search found.

    Attributes:
        text: What follows the prompt.
        log_probability: ln p of its tokens, the end of the sequence included if it was reached.
        tokens: How many they are.
    """

    text: str
    log_probability: float
    tokens: int


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 100,
    beams: int = 4,
    length_penalty: float = 1.0,
    alphabet: str | None = None,
) -> list[Beam]:
    """Return the likeliest continuations of a prompt that a beam finds, best first.

    Args:
        model: The language model, on any device.
        tokenizer: Its tokenizer.
        prompt: What to continue.
        length: Most tokens.
        beams: How many unfinished continuations are followed, and most that are returned.
        length_penalty: α: continuations are compared by ln p / tokens^α. 0 compares ln p itself.
        alphabet: The only characters that may be generated; see `allowed_tokens`. p is then of what is allowed.

    Raises:
        InputError: `length` or `beams` is below 1, or the alphabet allows nothing.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> best, *others = beam_search(model, ByteTokenizer(), "To be", length=5, beams=3)
        >>> len(others), best.tokens
        (2, 5)
    """
    _check_length(length)
    if beams < 1:
        raise InputError(f"--beams {beams}: expected at least 1")
    forbidden = _forbidden(tokenizer, alphabet)
    device = next(model.parameters()).device
    model.eval()
    history = torch.tensor([first_ids(tokenizer, prompt)], device=device).T
    logits, state = model(history)
    alive = [_Path((), 0.0)]
    ended: list[_Path] = []
    for _ in range(length):
        p = _allowed(logits[-1], forbidden).log_softmax(-1).double()
        totals = p + torch.tensor([path.log_probability for path in alive], dtype=torch.float64)[:, None]
        best = totals.flatten().topk(min(2 * beams, totals.numel()))
        rows, grown = [], []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row, token = divmod(place, totals.shape[1])
            if total == -np.inf or len(grown) == beams:
                break
            path = _Path((*alive[row].tokens, token), total)
            if token == tokenizer.eos_id:
                ended.append(path)
            else:
                rows.append(row)
                grown.append(path)
        alive = grown
        ended = sorted(ended, key=lambda path: -path.score(length_penalty))[:beams]
        if not alive or _is_settled(alive, ended, beams, length, length_penalty):
            break
        state = tuple(part.index_select(1, torch.tensor(rows, device=device)) for part in state)
        logits, state = model(torch.tensor([[path.tokens[-1] for path in alive]], device=device), state)
    found = sorted([*alive, *ended], key=lambda path: -path.score(length_penalty))[:beams]
    return [_beam(path, tokenizer, prompt) for path in found]


@dataclass(frozen=True)
class _Path:
    tokens: tuple[int, ...]
    log_probability: float

    def score(self, length_penalty: float) -> float:
        return self.log_probability / max(len(self.tokens), 1) ** length_penalty


def _is_settled(alive: list[_Path], ended: list[_Path], beams: int, length: int, length_penalty: float) -> bool:
    """Return whether no unfinished path can still come before the finished ones, even if all its other tokens were certain."""
    if len(ended) < beams:
        return False
    longest = length if length_penalty > 0 else len(alive[0].tokens)
    most = max(path.log_probability for path in alive) / longest**length_penalty
    return most <= ended[-1].score(length_penalty)


def _beam(path: _Path, tokenizer: Tokenizer, prompt: str) -> Beam:
    decoder = _primed(tokenizer, prompt)
    text = "".join(decoder.push(token) for token in path.tokens if token != tokenizer.eos_id)
    return Beam(text, path.log_probability, len(path.tokens))
