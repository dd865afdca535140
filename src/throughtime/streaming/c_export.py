"""A model as one C99 file: a step of it, for machines that have no Python; only libm is needed, and nothing is allocated."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from throughtime.arguments import describe_value
from throughtime.errors import InputError, unknown_name
from throughtime.streaming import c_text
from throughtime.streaming.placing import write_whole
from throughtime.streaming.reading import LinearStage, RecurrentStage, snapshot

PRECISIONS = ("float32", "int8")
_DEEPEST_INT8 = (2**31 - 1) // 127**2  # products whose sum an int of 32 bits holds, whatever the numbers are
_SHARES_ITS_PRODUCT = ("gru_reset_before", "mgu")  # their candidate's W_hh meets what another gate makes of h


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: The file.
        name: What its functions' names begin with.
        parameters: Bytes of its constant arrays.
        state: Bytes of the struct that a caller keeps, for each stream.
    """

    path: Path
    name: str
    parameters: int
    state: int


def export_c(
    model: Any,
    path: str | Path,
    *,
    precision: str = "float32",
    name: str | None = None,
    ids: bool | None = None,
    texts: Sequence[bytes] | None = None,
) -> Exported:
    """Write a model as one C99 file that computes its steps.

    The file declares a struct NAME, which a caller owns, one for each stream, and `NAME_reset(&s)` and `NAME_step(&s, x, y)`. x has
    NAME_INPUTS numbers, or is a token id, and y NAME_OUTPUTS; a step with an id that there isn't returns −1 and does nothing, any
    other 0. It needs no library but libm, and allocates nothing. `#define NAME_DECLARATIONS_ONLY` before it is included
    makes it its own header.

    It computes as the model does in `eval()`, in float32, and differs from a layer by rounding.

    Args:
        model: What `throughtime.stream` takes: a recurrent layer of one direction, an `nn.Sequential` of an embedding, recurrent
            and linear layers, a `LanguageModel` or a loaded run.
        path: The file to write: whole or not at all, where a link leads to, and into a device or pipe as it is.
        precision: "float32", or "int8": weights as bytes with a scale for each output, and what they meet rounded likewise, by the
            rule of `throughtime.stream(precision="int8")`. What reads token ids stays float32.
        name: What C's names begin with: a letter, then letters, digits and underscores, no keyword of C or C++ and nothing
            that their headers define. By default the file's name, made so.
        ids: Whether it reads token ids; `None` leaves that to the model.
        texts: What each token id stands for, which the file then has as NAME_text, with NAME_lengths in bytes.

    Returns:
        The file's path, its name in C, and bytes of weights and of a state.

    Raises:
        InputError: A part of the model can't be stepped, a weight is no number, the name is no C identifier, or in int8 a layer
            reads more than 133,144 numbers.
        OSError: The file can't be written.

    Example:
        >>> import torch, throughtime
        >>> layer = torch.nn.Sequential(throughtime.LSTM(1, 16), torch.nn.Linear(16, 1))
        >>> done = throughtime.export_c(layer, "amplifier.c")
        >>> done.name, done.state
        ('amplifier', 644)
    """
    path = Path(path)
    if not path.name or "\0" in path.name:
        raise InputError(f"path={os.fspath(path)!r} names no file; expected one such as model.c")
    name = _as_name(path.stem) if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise InputError(
            f"name={name!r} can't be a name in C; expected a letter, then letters, digits and underscores, as in 'model'"
        )
    if name in _TAKEN:
        raise InputError(f"name={name!r} can't be a name in C, where it means something; expected another, as 'model'")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    seen = snapshot(model, ids)
    tensors = [tensor for stage in seen.stages for tensor in stage.tensors()]
    if not all(
        bool(tensor.isfinite().all()) for tensor in [*tensors, *([] if seen.embedding is None else [seen.embedding])]
    ):
        raise InputError("the model's weights hold a number that isn't finite; expected a trained model")
    writer = _Writer(name, precision, seen.reads_ids)
    embedding = seen.embedding
    if embedding is not None:
        writer.embed(embedding)
    for place, stage in enumerate(seen.stages):
        writer.stage(stage, is_first=place == 0, chosen=seen.reads_ids and embedding is None and place == 0)
    if texts is not None:
        writer.texts = _checked_texts(texts, seen.vocabulary_size if seen.reads_ids else None)
    text = writer.text(seen.vocabulary_size, seen.stages[0].input_size, seen.stages[-1].output_size)
    write_whole(path, text.encode("ascii"))
    return Exported(path, name, writer.bytes, 4 * writer.floats + writer.other_bytes)


# What a name can't be: keywords of C and C++, what the file itself defines, and macros, structs and types of the language and of
# the headers that a program is likely to include beside it.
_TAKEN = frozenset(
    re.findall(
        r"\w+",
        "auto break case char const continue default do double else enum extern float for goto if inline int long register "
        "restrict return short signed sizeof static struct switch typedef union unsigned void volatile while main "
        "bool true false nullptr alignas alignof constexpr static_assert thread_local typeof typeof_unqual asm noreturn "
        "complex imaginary atomic "
        "and and_eq bitand bitor catch char8_t char16_t char32_t class co_await co_return co_yield compl concept const_cast "
        "consteval constinit decltype delete dynamic_cast explicit export friend mutable namespace new noexcept not not_eq "
        "operator or or_eq private protected public reinterpret_cast requires static_cast template this throw try typeid "
        "typename using virtual wchar_t xor xor_eq "
        "product product8 exponential sigmoid squash normalise "
        "NULL NAN INFINITY HUGE_VAL HUGE_VALF HUGE_VALL EOF BUFSIZ CLOCKS_PER_SEC RAND_MAX EXIT_SUCCESS EXIT_FAILURE I M_PI M_E "
        "SEEK_SET SEEK_CUR SEEK_END math_errhandling "
        # structs and types of the same headers: a struct of that name is another in C, or no struct in C++
        "tm timespec lconv stat timeval timezone itimerval itimerspec sigaction sigval flock termios pollfd iovec sockaddr in_addr "
        "FILE DIR fpos_t div_t ldiv_t lldiv_t size_t ssize_t ptrdiff_t intptr_t uintptr_t intmax_t uintmax_t wint_t max_align_t "
        "int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t float_t double_t time_t clock_t off_t pid_t mode_t "
        "jmp_buf va_list "
        "assert errno stdin stdout stderr offsetof setjmp va_arg va_copy va_end va_start isnan isinf isfinite isnormal signbit "
        "fpclassify linux unix i386 min max near far small",
    )
)


def _as_name(text: str) -> str:
    """Make a name of C of a file's."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return name if re.match("[A-Za-z]", name) and name not in _TAKEN else f"model_{name.lstrip('_')}".rstrip("_")


def _checked_texts(texts: Sequence[bytes], tokens: int | None) -> list[bytes]:
    """Return what tokens stand for, of a model that reads so many ids, or none."""
    texts = list(texts)
    if len(texts) != tokens:
        expected = "none, as it reads no ids" if tokens is None else f"one for each of {tokens} token ids"
        raise InputError(f"{len(texts)} texts were given for the model's tokens; expected {expected}")
    for place, text in enumerate(texts):
        if not isinstance(text, bytes):
            raise InputError(f"texts[{place}] is {describe_value(text)}; expected bytes")
        if len(text) > 65535:
            raise InputError("a token's text is longer than 65,535 bytes; expected shorter ones")
    return texts


class _Writer:
    """Gathers arrays, the struct's fields and the statements of a step."""

    def __init__(self, name: str, precision: str, reads_ids: bool) -> None:
        self.name, self.precision, self.reads_ids = name, precision, reads_ids
        self.arrays: list[str] = []
        self.fields: list[str] = []
        self.statements: list[str] = []
        self.needs: set[str] = set()
        self.texts: list[bytes] = []
        self.bytes = self.floats = self.other_bytes = 0
        self.states: list[str] = []
        self.current = "x"  # where the numbers are that the next stage reads
        self.widest_rows = self.widest_depth = self.stages = 0

    # Parts ----------------------------------------------------------------------------------------------------------

    def constant(self, name: str, tensor: Tensor | NDArray[Any]) -> str:
        """Add an array of float32, or of int8."""
        values = tensor.numpy() if isinstance(tensor, Tensor) else tensor
        if values.dtype == np.int8:
            self.arrays.append(c_text.byte_array(name, values))
        else:
            self.arrays.append(c_text.float_array(name, values))
        self.bytes += values.nbytes
        return name

    def room(self, name: str, count: int) -> str:
        """Add an array of float32 to the struct."""
        self.fields.append(f"float {name}[{count}];")
        self.floats += count
        return f"s->{name}"

    def state(self, name: str, count: int) -> str:
        """Add such an array that `reset` makes zero."""
        self.states.append(f"for (j = 0; j < {count}; ++j) s->{name}[j] = 0.0f;")
        return self.room(name, count)

    def say(self, *lines: str) -> None:
        """Add statements to the step."""
        self.statements += lines

    def product(self, name: str, weight: Tensor, start: str | None, x: str, out: str, exact: bool = False) -> None:
        """Say out = start + W x."""
        rows, columns = weight.shape
        begin = start or "0"
        if self.precision == "int8" and not exact:
            if columns > _DEEPEST_INT8:
                raise InputError(
                    f"a product of int8 sums at most {_DEEPEST_INT8:,} numbers exactly, and a layer reads {columns:,}; expected "
                    "precision='float32'"
                )
            steps, scale = _quantised(weight)
            self.needs |= {"QUANTISED"}
            self.constant(name, c_text.in_blocks(steps))
            self.constant(f"{name}_scale", scale)
            self.widest_rows, self.widest_depth = max(self.widest_rows, rows), max(self.widest_depth, columns)
            self.say(f"product8({rows}, {columns}, {name}, {name}_scale, {begin}, {x}, s->q, s->sum, {out});")
        else:
            self.needs |= {"PRODUCT"}
            self.constant(name, c_text.in_blocks(weight.numpy()))
            self.say(f"product({rows}, {columns}, {name}, {begin}, {x}, {out});")

    def embed(self, embedding: Tensor) -> None:
        """Let the first stage read a row of an embedding."""
        self.constant("embedding", embedding)
        self.current = f"(embedding + (long)id * {embedding.shape[1]})"

    # Stages ---------------------------------------------------------------------------------------------------------

    def stage(self, stage: RecurrentStage | LinearStage, is_first: bool, chosen: bool) -> None:
        """Add a layer. A chosen one reads an id in place of a one-hot vector."""
        number, self.stages = self.stages, self.stages + 1
        self.say(f"/* {number}: {stage.describe()} */")
        if isinstance(stage, LinearStage):
            out = self.room(f"y{number}", stage.output_size)
            start = None if stage.bias is None else self.constant(f"b{number}", stage.bias)
            self.product(f"w{number}", stage.weight, start, self.current, out)
            self.current = out
            return
        self.current = _Cell(self, stage, number).step(self.current, chosen, exact=is_first and self.reads_ids)

    # The file -------------------------------------------------------------------------------------------------------

    def text(self, vocabulary: int, inputs: int, outputs: int) -> str:
        """Put the file together."""
        if self.widest_depth:
            self.fields += [f"int q[{self.widest_depth}];", f"int32_t sum[{self.widest_rows}];"]
            self.other_bytes = 4 * (self.widest_depth + self.widest_rows)
        given = "long id" if self.reads_ids else "const float *x"
        step = f"int {self.name}_step(struct {self.name} *s, {given}, float *y)"
        upper = self.name.upper()
        size = f"{upper}_TOKENS {vocabulary}" if self.reads_ids else f"{upper}_INPUTS {inputs}"
        lines = [
            f"/* A recurrent model, one step at a time, in {self.precision}; throughtime wrote it. C99 and libm, no allocation.",
            f"   Keep a struct {self.name} for each stream, {self.name}_reset it, and {self.name}_step it. With",
            f"   {upper}_DECLARATIONS_ONLY defined, this file is its own header. */",
            f"#ifndef {upper}_DECLARED",
            f"#define {upper}_DECLARED",
            f"#define {size}",
            f"#define {upper}_OUTPUTS {outputs}",
            *self._declarations(step, outputs),
            "#endif",
            "",
            f"#ifndef {upper}_DECLARATIONS_ONLY",
            *self._definitions(step, vocabulary, outputs),
            "#endif",
            "",
        ]
        return "\n".join(lines)

    def _declarations(self, step: str, outputs: int) -> list[str]:
        name, tokens = self.name, f"[{self.name.upper()}_TOKENS]"
        no_id = ", or -1, having done nothing, where there is no such id" if self.reads_ids else ""
        texts = [
            f"extern const char *const {name}_text{tokens};",
            f"extern const unsigned short {name}_lengths{tokens};",
        ]
        return [
            *(["#include <stdint.h>"] if self.widest_depth else []),
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            f"struct {name} {{",
            *(f"  {field}" for field in self.fields),
            "};",
            f"void {name}_reset(struct {name} *s);",
            f"/* y has {outputs} numbers. Returns 0{no_id}. */",
            f"{step};",
            *(texts if self.texts else []),
            "#ifdef __cplusplus",
            "}",
            "#endif",
        ]

    def _definitions(self, step: str, vocabulary: int, outputs: int) -> list[str]:
        parts = ("PRODUCT", "QUANTISED", "EXPONENTIAL", "SIGMOID", "SQUASH", "NORMALISE")
        return [
            "#include <math.h>",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            *([c_text.text_array(self.name, self.texts)] if self.texts else []),
            *self.arrays,
            *(getattr(c_text, part).strip() + "\n" for part in parts if part in self.needs),
            f"void {self.name}_reset(struct {self.name} *s) {{",
            "  int j;",
            *(f"  {line}" for line in self.states),
            "}",
            "",
            f"{step} {{",
            "  int j;",
            *([f"  if (id < 0 || id >= {vocabulary}) return -1;"] if self.reads_ids else []),
            *(f"  {line}" for line in self.statements),
            f"  for (j = 0; j < {outputs}; ++j) y[j] = {self.current}[j];",
            "  return 0;",
            "}",
        ]


class _Cell:
    """The statements of a recurrent layer's step, in the letters of `throughtime.cells`, which these are tested against."""

    def __init__(self, writer: _Writer, stage: RecurrentStage, number: int) -> None:
        self.to, self.stage, self.number = writer, stage, number
        self.base, self.hidden = stage.spec.base, stage.hidden_size
        self.gates = stage.spec.gates
        self.p = stage.parameters
        self.is_normalised = stage.spec.is_normalised
        self.shares = self.base in _SHARES_ITS_PRODUCT

    def name(self, of: str) -> str:
        """Name an array of this layer."""
        return f"{of}{self.number}"

    def step(self, x: str, chosen: bool, exact: bool) -> str:
        """Say a step; return where its output is."""
        to, hidden, rows = self.to, self.hidden, self.gates * self.hidden
        self.h = to.state(self.name("h"), self.stage.output_size)
        if self.base == "lstm":
            self.c = to.state(self.name("c"), hidden)
        self.a, self.u = to.room(self.name("a"), rows), to.room(self.name("u"), rows)
        self._from_input(x, chosen, exact)
        last = rows - hidden if self.shares else rows
        self._from_state("w_hh", self.p.weight_hh[:last], self.h, 0, last)
        getattr(self, f"_{self.base.removesuffix('_tanh').removesuffix('_relu')}")()
        return self.h

    def _from_input(self, x: str, chosen: bool, exact: bool) -> None:
        """Say a = W_ih x + b_ih, normalised."""
        to, rows = self.to, self.gates * self.hidden
        bias = None if self.p.bias_ih is None else to.constant(self.name("b_ih"), self.p.bias_ih)
        start = None if self.is_normalised else bias
        weight = self.p.weight_ih
        if chosen:
            to.constant(self.name("w_ih"), weight.t().contiguous())
            begin = f"{start}[j]" if start else "0.0f"
            to.say(f"for (j = 0; j < {rows}; ++j) {self.a}[j] = {begin} + {self.name('w_ih')}[id * {rows} + j];")
        else:
            to.product(self.name("w_ih"), weight, start, x, self.a, exact)
        self._normalise("gain_ih", self.p.gain_ih, bias, self.a, 0, rows)

    def _from_state(self, name: str, weight: Tensor, h: str, first: int, last: int) -> None:
        """Say u = W_hh h + b_hh, normalised, of some rows."""
        to, out = self.to, f"{self.u} + {first}" if first else self.u
        bias = None
        if self.p.bias_hh is not None:
            bias = to.constant(self.name(f"b{name[1:]}"), self.p.bias_hh[first:last])
        to.product(self.name(name), weight, None if self.is_normalised else bias, h, out)
        gain = None if self.p.gain_hh is None else self.p.gain_hh[first:last]
        self._normalise(f"gain{name[1:]}", gain, bias, out, first, last)

    def _normalise(self, name: str, gain: Tensor | None, shift: str | None, of: str, first: int, last: int) -> None:
        if gain is not None:
            self.to.needs |= {"NORMALISE"}
            self.to.say(f"normalise({last - first}, {self.to.constant(self.name(name), gain)}, {shift or 0}, {of});")

    def _each(self, *lines: str) -> None:
        for function in ("sigmoid", "squash"):
            if any(f"{function}(" in line for line in lines):
                self.to.needs |= {"EXPONENTIAL", function.upper()}
        self.to.say(f"for (j = 0; j < {self.hidden}; ++j) {{", *(f"  {line}" for line in lines), "}")

    def _gate(self, gate: int, more: str = "") -> str:
        at = f"j + {gate * self.hidden}" if gate else "j"
        return f"{self.a}[{at}] + {self.u}[{at}]{more}"

    def _keep(self, of: str, share: float, new: str) -> str:
        """Say what becomes of a state: zoneout keeps a share of the old one."""
        if not share:
            return f"{of}[j] = {new};"
        kept, rest = c_text.floats(np.array([share, 1 - np.float32(share)], np.float32))
        return f"{of}[j] = {kept} * {of}[j] + {rest} * ({new});"

    # Cells ----------------------------------------------------------------------------------------------------------

    def _rnn(self) -> None:
        a = self._gate(0)
        if self.base == "rnn_relu":
            self._each(f"const float a = {a};", self._keep(self.h, self.stage.share_h, "a < 0.0f ? 0.0f : a"))
        else:
            self._each(self._keep(self.h, self.stage.share_h, f"squash({a})"))

    def _lstm(self) -> None:
        to, hidden, coupled = self.to, self.hidden, "coupled" in self.stage.spec.variants
        peepholes = {"i": "", "f": "", "o": ""}
        if self.p.weight_ch is not None:
            weight = to.constant(self.name("w_ch"), self.p.weight_ch)
            order = "fo" if coupled else "ifo"
            peepholes |= {
                gate: f" + {weight}[j + {place * hidden}] * {'new_c' if gate == 'o' else f'{self.c}[j]'}"
                for place, gate in enumerate(order)
            }
        first = 0 if coupled else 1
        i = "1.0f - f" if coupled else f"sigmoid({self._gate(0, peepholes['i'])})"
        m = to.room(self.name("m"), hidden) if self.p.weight_hr is not None or self.p.gain_c is not None else None
        lines = [
            f"const float f = sigmoid({self._gate(first, peepholes['f'])});",
            f"const float i = {i};",
            f"const float g = squash({self._gate(first + 1)});",
            f"const float new_c = f * {self.c}[j] + i * g;",
            f"const float o = sigmoid({self._gate(first + 2, peepholes['o'])});",
            self._keep(self.c, self.stage.share_c, "new_c"),
        ]
        if self.p.gain_c is not None:
            self._each(*lines, f"{m}[j] = new_c;", f"{self.u}[j] = o;")
            self.to.needs |= {"NORMALISE"}
            assert self.p.shift_c is not None
            gain, shift = (
                to.constant(self.name("gain_c"), self.p.gain_c),
                to.constant(self.name("shift_c"), self.p.shift_c),
            )
            to.say(f"normalise({hidden}, {gain}, {shift}, {m});")
            lines, of_c = [f"const float o = {self.u}[j];"], f"{m}[j]"
        else:
            of_c = "new_c"
        if self.p.weight_hr is None:
            self._each(*lines, self._keep(self.h, self.stage.share_h, f"o * squash({of_c})"))
            return
        self._each(*lines, f"{m}[j] = o * squash({of_c});")
        assert m is not None
        width = self.stage.output_size
        to.product(self.name("w_hr"), self.p.weight_hr, None, m, self.u)
        to.say(f"for (j = 0; j < {width}; ++j) {self._keep(self.h, self.stage.share_h, f'{self.u}[j]')}")

    def _gru(self) -> None:
        n = 2 * self.hidden
        self._each(
            f"const float r = sigmoid({self._gate(0)});",
            f"const float z = sigmoid({self._gate(1)});",
            f"const float n = squash({self.a}[j + {n}] + r * {self.u}[j + {n}]);",
            self._keep(self.h, self.stage.share_h, f"(1.0f - z) * n + z * {self.h}[j]"),
        )

    def _gru_reset_before(self) -> None:
        self._candidate(0, 1, "(1.0f - z) * n + z * {h}[j]")

    def _mgu(self) -> None:
        self._candidate(0, 0, "(1.0f - z) * {h}[j] + z * n")

    def _candidate(self, meets: int, mixes: int, mix: str) -> None:
        """Say a cell whose n sees a gate times h: that gate, the one that mixes, the product, and the mixture."""
        to, hidden = self.to, self.hidden
        m, last = to.room(self.name("m"), hidden), (self.gates - 1) * hidden
        z = f"{self.u}[j + {mixes * hidden}]" if mixes else f"{self.u}[j]"
        lines = [f"const float r = sigmoid({self._gate(meets)});", f"{m}[j] = r * {self.h}[j];"]
        lines.append(f"{z} = sigmoid({self._gate(mixes)});" if mixes != meets else f"{z} = r;")
        self._each(*lines)
        self._from_state("w_nh", self.p.weight_hh[last:], m, last, last + hidden)
        self._each(
            f"const float z = {z};",
            f"const float n = squash({self._gate(self.gates - 1)});",
            self._keep(self.h, self.stage.share_h, mix.format(h=self.h)),
        )


def _quantised(weight: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round each row to 127 steps on either side of zero; return the steps and what one stands for. As csrc/quantised.h does."""
    values = weight.numpy()
    largest = np.abs(values).max(1)
    is_zero = largest < np.float32(1e-30)
    with np.errstate(divide="ignore"):
        inverse = np.where(is_zero, np.float32(0), np.float32(127) / largest).astype(np.float32)
    step = np.where(is_zero, np.float32(0), largest / np.float32(127)).astype(np.float32)
    return np.rint(values * inverse[:, None]).astype(np.int8), step
