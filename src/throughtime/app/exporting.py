"""What `throughtime export` writes."""

from pathlib import Path
from typing import TYPE_CHECKING

from throughtime.errors import InputError
from throughtime.lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from throughtime.streaming import Exported, export_c

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def write_c(run: "Run", out: Path, *, precision: str, name: str | None, last: bool) -> Exported:
    """Write a run's model as C, with what its tokens stand for where these are characters or bytes.

    Raises:
        InputError: The model can't be stepped, or the file can't be written.
    """
    if out.suffix != ".c":
        raise InputError(f"{out}: a model is written as C here; expected a file that ends in .c, such as model.c")
    model = run.load_model("cpu", last=last)
    try:
        return export_c(model, out, precision=precision, name=name, texts=_texts(run.tokenizer))
    except OSError as error:
        raise InputError(f"{out} can't be written: {error.strerror}") from None


def _texts(tokenizer: Tokenizer) -> list[bytes] | None:
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.token_bytes(token) for token in range(tokenizer.vocabulary_size)]
    if isinstance(tokenizer, CharTokenizer):
        return [
            tokenizer.decode([token]).encode("utf-8", "surrogatepass") for token in range(tokenizer.vocabulary_size)
        ]
    return None
