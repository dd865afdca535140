"""Text from a language model: sampled token by token, or the likeliest by beam search."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from throughtime.errors import FieldError, InputError
from throughtime.lm.bpe import BpeTokenizer
from throughtime.lm.kinds import settled
from throughtime.lm.model import LanguageModel
from throughtime.lm.streamed import stream_of
from throughtime.lm.tokenizer import ByteTokenizer, Tokenizer, line_end_ids, to_bytes
from throughtime.streaming import Stream
from throughtime.streaming.writing import NoNumberError, Writer

_A_MOMENT = 0.01  # seconds for which text may be kept back to be written faster
MOST_TOKENS = 10**9  # beyond all patience: what is meant by more is a slip, or no end at all
Piece = TypeVar("Piece", str, bytes)


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
        InputError: A value is of another type, or out of its range.
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
        for each in fields(self):
            object.__setattr__(self, each.name, settled(each.name, getattr(self, each.name), each.type))
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
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise InputError(
                f"--repetition-penalty {self.repetition_penalty}: expected a number above 0, from 1e-6 to 1e6; 1 is off"
            )
        if self.no_repeat_ngram < 0:
            raise InputError(f"--no-repeat-ngram {self.no_repeat_ngram}: expected a number of tokens, or 0 for off")

    def choose(self, logits: Tensor, chance: np.random.Generator, history: Sequence[int] = ()) -> int | None:
        """Choose a token.

        Args:
            logits: (V,); what must not be chosen has −inf.
            chance: Where chance comes from.
            history: The tokens so far.

        Returns:
            The token, or `None` if all are forbidden.

        Raises:
            InputError: A logit is no number.
        """
        logits = self._penalised(logits.double(), history)
        likeliest = int(logits.argmax())  # a NaN comes first
        if torch.isnan(logits[likeliest]):
            raise InputError("the model's output is no number (NaN): its weights are no good; train it anew")
        if torch.isneginf(logits[likeliest]):
            return None
        if self.greedy:
            return likeliest
        sums = self._limited((logits - logits[likeliest]) / self.temperature).cumsum(0).numpy()
        place = int(np.searchsorted(sums, chance.random() * sums[-1], side="right"))
        return min(place, int(np.searchsorted(sums, sums[-1])))  # the last that has a probability

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
    *,
    precision: str = "float32",
) -> Iterator[str]:
    """Continue a prompt; yield text as it comes. The prompt and what is yielded are the whole text.

    The unknown token is never chosen. A model of sequences begins one, and stops at its end. Without a prompt, a model of a
    stream starts as after a line end, or, where it knows no line end, after the last token of its vocabulary.

    Args:
        model: The language model, on any device.
        tokenizer: Its tokenizer.
        prompt: What to continue; it is not repeated. Characters unknown to the model are read as its unknown token. At level
            "byte", what isn't UTF-8 is given as `os.fsdecode` gives it.
        length: How many tokens to generate at most, from 1 to `MOST_TOKENS`.
        sampling: How to choose.
        seed: Makes the text reproducible.
        stop: Texts before which to stop; they are not part of what is yielded.
        alphabet: The only characters that may be generated; see `allowed_tokens`. Where penalties leave none, the text ends.
        precision: What products multiply, see `throughtime.stream`; `throughtime quantize` says what less than "float32" costs.

    Raises:
        InputError: `length` is out of its range, `seed` below 0, one of them no whole number; a stop text is empty, or the alphabet
            allows nothing.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> text = "".join(generate(model, ByteTokenizer(), "To be", length=20, seed=1))
    """
    _check_seed(seed)
    opening = _checked_opening(tokenizer, prompt, length, stop, alphabet)
    pieces = opening.continued(_tokens(model, tokenizer, opening, length, sampling, seed, precision), tokenizer)
    return _until(pieces, stop) if stop else pieces


def generate_bytes(
    model: LanguageModel,
    tokenizer: ByteTokenizer,
    prompt: str = "",
    length: int = 500,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
    stop: Sequence[str] = (),
    alphabet: str | None = None,
    *,
    precision: str = "float32",
) -> Iterator[bytes]:
    r"""Continue a prompt as `generate` does, for a model of bytes; yield the bytes themselves, whatever they stand for.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> len(b"".join(generate_bytes(model, ByteTokenizer(), "caf\udce9", length=20, seed=1)))
        20
    """
    _check_seed(seed)
    opening = _checked_opening(tokenizer, prompt, length, stop, alphabet)
    pieces = map(tokenizer.token_bytes, _tokens(model, tokenizer, opening, length, sampling, seed, precision))
    return _until(pieces, [to_bytes(text) for text in stop]) if stop else pieces


def seed_of_sample(seed: int | None, number: int) -> int | None:
    """Return the seed of one of several samples, counted from 0, if they are to be repeatable.

    The first has the seed itself; those of the others are drawn from it, so that no two seeds have a sample in common.
    """
    _check_seed(seed)
    if seed is None or number == 0:
        return seed
    drawn = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(4)
    return int.from_bytes(drawn.tobytes(), "little")


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


def _check_length(length: int, most: int, of_what: str = "") -> None:
    if not 1 <= settled("length", length, int) <= most:
        raise InputError(f"--length {length}: expected a number of tokens from 1 to {most:,}{of_what}")


def _check_seed(seed: int | None) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
        raise FieldError("seed", seed, "a whole number, at least 0")


class Opening(NamedTuple):
    """What a model has read before it chooses the first token.

    Attributes:
        ids: The tokens that are read.
        read: Those of the prompt among them.
        owed: The space that the prompt ends with and that comes with the next token, or several; else "".
        forbidden: Which tokens (V,) are never chosen.
        forbidden_at_first: Which aren't chosen as the first token: where a space is owed, it has to begin with it.
    """

    ids: list[int]
    read: list[int]
    owed: str
    forbidden: Tensor
    forbidden_at_first: Tensor

    def continued(self, tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the text of the tokens that follow, as it comes, from where the prompt ends."""
        decoder = tokenizer.decoder()
        for token in self.read:  # so that it knows whether a space comes first
            decoder.push(token)
        owed = self.owed
        for token in tokens:
            text = decoder.push(token)
            if text and owed:
                text, owed = text.removeprefix(" "), ""
            if text:
                yield text


def open_with(tokenizer: Tokenizer, prompt: str, alphabet: str | None = None) -> Opening:
    """Return what is read of a prompt, and what may follow it.

    Args:
        tokenizer: The model's tokenizer.
        prompt: What to go on from.
        alphabet: The only characters that may follow; `None` allows all.

    Raises:
        InputError: The alphabet allows nothing, or the prompt goes beyond the first line of a model whose sequences are lines.
    """
    if tokenizer.sequences == "line" and "\n" in prompt:
        raise InputError(
            "the prompt goes beyond its line, and this run's sequences are lines; expected the beginning of one"
        )
    forbidden = _forbidden(tokenizer, alphabet)
    whole, owed = tokenizer.split_prompt(prompt)
    read = tokenizer.encode(whole).tolist()
    at_first = forbidden
    if owed:
        at_first = forbidden | ~torch.from_numpy(tokenizer.begins_with_space(read[-1] if read else None))
        if bool(at_first.all()):
            read, owed, at_first = tokenizer.encode(prompt).tolist(), "", forbidden
    if tokenizer.eos_id is not None:
        return Opening([tokenizer.eos_id, *read], read, owed, forbidden, at_first)
    return Opening(read or line_end_ids(tokenizer) or [tokenizer.vocabulary_size - 1], read, owed, forbidden, at_first)


def _checked_opening(
    tokenizer: Tokenizer, prompt: str, length: int, stop: Sequence[str], alphabet: str | None
) -> Opening:
    _check_length(length, MOST_TOKENS)
    if not all(stop):
        raise InputError("--stop '': expected a text that isn't empty")
    return open_with(tokenizer, prompt, alphabet)


@torch.no_grad()
def _tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    opening: Opening,
    length: int,
    sampling: Sampling,
    seed: int | None,
    precision: str,
) -> Iterator[int]:
    """Yield the tokens that follow, as they are chosen; the end of a sequence isn't among them."""
    chance = np.random.default_rng(seed)
    model.eval()
    if (stream := stream_of(model, precision)) is not None:
        yield from _streamed_tokens(stream, tokenizer, opening, length, sampling, chance)
        return
    device = next(model.parameters()).device
    history, forbidden = list(opening.ids), opening.forbidden_at_first
    logits, state = model(torch.tensor(history, device=device)[:, None])
    for _ in range(length):
        token = sampling.choose(_allowed(logits[-1, 0], forbidden), chance, history)
        if token is None or token == tokenizer.eos_id:
            return
        yield token
        history.append(token)
        forbidden = opening.forbidden
        logits, state = model(torch.tensor([[token]], device=device), state)


def _streamed_tokens(
    stream: Stream,
    tokenizer: Tokenizer,
    opening: Opening,
    length: int,
    sampling: Sampling,
    chance: np.random.Generator,
) -> Iterator[int]:
    """The same, chosen and read natively, some at a time: as many as take a moment."""
    writer = Writer(stream, tokenizer.eos_id, **asdict(sampling))
    writer.read(opening.ids)
    forbidden, count = opening.forbidden_at_first, 1
    while length:
        began = time.perf_counter()
        chances = np.zeros(count) if sampling.greedy else chance.random(count)
        try:
            tokens = writer.write(chances, forbidden.numpy()).tolist()
        except NoNumberError as error:
            yield from error.tokens.tolist()
            raise
        yield from tokens
        if len(tokens) < count:
            return
        length -= count
        grown = count if time.perf_counter() - began > _A_MOMENT else 2 * count
        forbidden, count = opening.forbidden, min(grown, length)


def _allowed(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Return logits on the CPU in which some tokens can't be chosen."""
    return logits.float().cpu().masked_fill(forbidden, -torch.inf)


def _until(pieces: Iterator[Piece], stop: Sequence[Piece]) -> Iterator[Piece]:
    """Pass text on up to a stop text; what may be the beginning of one is held back."""
    held = stop[0][:0]
    for piece in pieces:
        held += piece
        found = [place for text in stop if (place := held.find(text)) >= 0]
        if found:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        begun = (
            n for text in stop for n in range(1, min(len(text), len(held) + 1)) if held[len(held) - n :] == text[:n]
        )
        longest = max(begun, default=0)
        if len(held) > longest:
            yield held[: len(held) - longest]
            held = held[len(held) - longest :]
    if held:
        yield held


MOST_BEAMS, MOST_BEAM_TOKENS = 1000, 10_000  # nothing is written before the end, and each step copies every beam


@dataclass(frozen=True)
class Beam:
    """A continuation that beam search found.

    Attributes:
        text: What follows the prompt.
        log_probability: ln p of its tokens, the end of the sequence included if it was reached.
        ids: Its tokens, but for the end of a sequence.
        tokens: How many they are, that end included.
    """

    text: str
    log_probability: float
    ids: tuple[int, ...]
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
        length: Most tokens, from 1 to `MOST_BEAM_TOKENS`.
        beams: How many unfinished continuations are followed, and most that are returned.
        length_penalty: α: continuations are compared by ln p / tokens^α. 0 compares ln p itself. From −10 to 10.
        alphabet: The only characters that may be generated; see `allowed_tokens`. p is then of what is allowed.

    Raises:
        InputError: `length`, `beams` or the penalty is out of range, or the alphabet allows nothing.

    Example:
        >>> from throughtime.lm import ByteTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=256, hidden_size=8))
        >>> best, *others = beam_search(model, ByteTokenizer(), "To be", length=5, beams=3)
        >>> len(others), best.tokens
        (2, 5)
    """
    _check_length(length, MOST_BEAM_TOKENS, " of a beam search")
    if not 1 <= beams <= MOST_BEAMS:
        raise InputError(f"--beams {beams}: expected from 1 to {MOST_BEAMS:,}")
    if not -10 <= length_penalty <= 10:
        raise InputError(f"--length-penalty {length_penalty}: expected a number from -10 to 10")
    opening = open_with(tokenizer, prompt, alphabet)
    forbidden = opening.forbidden_at_first
    device = next(model.parameters()).device
    model.eval()
    logits, state = model(torch.tensor(opening.ids, device=device)[:, None])
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
        alive, forbidden = grown, opening.forbidden
        ended = sorted(ended, key=lambda path: -path.score(length_penalty))[:beams]
        if not alive or _is_settled(alive, ended, beams, length, length_penalty):
            break
        state = tuple(part.index_select(1, torch.tensor(rows, device=device)) for part in state)
        logits, state = model(torch.tensor([[path.tokens[-1] for path in alive]], device=device), state)
    found = sorted([*alive, *ended], key=lambda path: -path.score(length_penalty))[:beams]
    return [_beam(path, tokenizer, opening) for path in found]


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


def _beam(path: _Path, tokenizer: Tokenizer, opening: Opening) -> Beam:
    ids = tuple(token for token in path.tokens if token != tokenizer.eos_id)
    return Beam("".join(opening.continued(ids, tokenizer)), path.log_probability, ids, len(path.tokens))
