"""What `throughtime export` writes."""

from pathlib import Path
from typing import TYPE_CHECKING

from throughtime.errors import InputError
from throughtime.lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from throughtime.streaming import Exported, ExportedOnnx, export_c, export_onnx

if TYPE_CHECKING:
    from throughtime.lm.run import Run


def write(run: "Run", out: Path, *, precision: str, name: str | None, last: bool) -> Exported | ExportedOnnx:
    """Write a run's model as what the file's name says: C, or ONNX.

    Raises:
        InputError: The model can't be stepped, the file can't be written, or isn't of either kind.
    """
    if out.suffix == ".c":
        return write_c(run, out, precision=precision, name=name, last=last)
    if out.suffix != ".onnx":
        raise InputError(
            f"{out}: expected a file that ends in .c or .onnx, such as model.c, which says what is written"
        )
    for option, given, usual in (("--precision", precision, "float32"), ("--name", name, None)):
        if given != usual:
            raise InputError(f"{option} {given} is for C; an ONNX file has float32 and names of its own: leave it out")
    try:
        return export_onnx(run.load_model("cpu", last=last), out)
    except OSError as error:
        raise InputError(f"{out} can't be written: {error.strerror}") from None


def write_c(run: "Run", out: Path, *, precision: str, name: str | None, last: bool) -> Exported:
    """Write a run's model as C, with what its tokens stand for where these are characters or bytes.

    Raises:
        InputError: The model can't be stepped, or the file can't be written.
    """
    model = run.load_model("cpu", last=last)
    try:
        return export_c(model, out, precision=precision, name=name, texts=_texts(run.tokenizer))
    except OSError as error:
        raise InputError(f"{out} can't be written: {error.strerror}") from None


def described(run: "Run", done: Exported | ExportedOnnx) -> list[str]:
    """Say in lines what was written, and how it is used."""
    wrote = f"wrote {done.path}: {done.parameters:,} bytes of numbers"
    if isinstance(done, ExportedOnnx):
        return [
            f"{wrote}; what ONNX Runtime computes differs from the equations in float64 by {done.largest_error:.1e} at most",
            f"from {', '.join(done.inputs)} it makes {', '.join(done.outputs)}",
        ]
    reads = ""
    if _texts(run.tokenizer) is not None:
        named = "" if done.name == "model" else "with --name model, "
        reads = f"; {named}examples/read_text.c reads and writes text with it"
    return [
        f"{wrote}, {done.state:,} bytes for each stream's struct {done.name}",
        f"{done.name}_step(&state, id, logits) steps it{reads}",
    ]


def _texts(tokenizer: Tokenizer) -> list[bytes] | None:
    if isinstance(tokenizer, ByteTokenizer):
        return [tokenizer.token_bytes(token) for token in range(tokenizer.vocabulary_size)]
    if isinstance(tokenizer, CharTokenizer):
        return [
            tokenizer.decode([token]).encode("utf-8", "surrogatepass") for token in range(tokenizer.vocabulary_size)
        ]
    return None
