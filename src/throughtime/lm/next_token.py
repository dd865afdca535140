"""What may come next: the tokens of a vocabulary by name, and the probability of each."""

import torch

from throughtime.lm.bpe import BpeTokenizer
from throughtime.lm.generation import open_with
from throughtime.lm.model import LanguageModel
from throughtime.lm.tokenizer import ByteTokenizer, Tokenizer
from throughtime.lm.words import UNKNOWN_WORD, WordTokenizer

UNKNOWN, END = UNKNOWN_WORD, "<eos>"


def token_names(tokenizer: Tokenizer) -> list[str]:
    r"""Return the name of each token (V,): the text that it is written with.

    The unknown token is "<unk>" and the end of a sequence "<eos>". A word is named without a space before it. Bytes that are no
    character by themselves are named by their escapes: "\xed".

    Example:
        >>> from throughtime.lm import CharTokenizer
        >>> token_names(CharTokenizer("ab", sequences="line"))
        ['<unk>', '<eos>', 'a', 'b']
    """
    if isinstance(tokenizer, ByteTokenizer | BpeTokenizer):
        pieces = map(tokenizer.token_bytes, range(tokenizer.vocabulary_size))
        names = [piece.decode("utf-8", "backslashreplace") for piece in pieces]
    elif isinstance(tokenizer, WordTokenizer):
        names = [tokenizer.text_of(token) for token in range(tokenizer.vocabulary_size)]
    else:
        names = [tokenizer.decode([token]) for token in range(tokenizer.vocabulary_size)]
    for token, name in ((tokenizer.unknown_id, UNKNOWN), (tokenizer.eos_id, END)):
        if token is not None:
            names[token] = name
    return names


@torch.no_grad()
def next_probabilities(model: LanguageModel, tokenizer: Tokenizer, prompt: str = "") -> dict[str, float]:
    """Return the probability of each token after a prompt, by its name, the likeliest first; they sum to 1.

    It is what the model says, before any temperature, limit or penalty. Tokens of the same name, such as a full stop after a word
    and one that stands alone, count together.

    Args:
        model: The language model, on any device.
        tokenizer: Its tokenizer.
        prompt: What was read before, as by `generate`.

    Example:
        >>> from throughtime.lm import CharTokenizer, LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocabulary_size=4, hidden_size=8))
        >>> found = next_probabilities(model, CharTokenizer("abc"), "ab")
        >>> sorted(found), round(sum(found.values()), 6)
        (['<unk>', 'a', 'b', 'c'], 1.0)
    """
    device = next(model.parameters()).device
    model.eval()
    opening = open_with(tokenizer, prompt)
    logits, _ = model(torch.tensor(opening.ids, device=device)[:, None])
    p, names = logits[-1, 0].double().softmax(0).cpu(), token_names(tokenizer)
    if (
        opening.owed
    ):  # the space at a prompt's end is the next token's, so that only tokens that begin with one can follow
        begins = tokenizer.begins_with_space(opening.read[-1] if opening.read else None)
        p = p * torch.from_numpy(begins)
        p, names = p / p.sum(), [name.removeprefix(" ") for name in names]
    together: dict[str, float] = {}
    for name, share in zip(names, p.tolist(), strict=True):
        together[name] = together.get(name, 0.0) + share
    return dict(sorted(together.items(), key=lambda item: -item[1]))
