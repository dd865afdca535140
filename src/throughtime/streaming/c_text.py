"""The C99 text of a model's step: fixed parts, and the numbers in a form that C reads back to the bit."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # rows whose sums stay in registers
_LONGEST_LITERAL = 4095  # bytes that C99 asks of a compiler

PRODUCT = """
/* out = start + W x. W lies in blocks of 32 rows, each by columns, so that a compiler makes vectors of the inner loops. */
static void product(int rows, int columns, const float *w, const float *start, const float *x, float *restrict out) {
  int r, k, i;
  for (r = 0; r + 32 <= rows; r += 32, w += 32L * columns) {
    float sum[32];
    for (i = 0; i < 32; ++i) sum[i] = start ? start[r + i] : 0.0f;
    for (k = 0; k < columns; ++k) {
      const float *const column = w + 32L * k;
      const float by = x[k];
      for (i = 0; i < 32; ++i) sum[i] += column[i] * by;
    }
    for (i = 0; i < 32; ++i) out[r + i] = sum[i];
  }
  for (i = r; i < rows; ++i) out[i] = start ? start[i] : 0.0f;
  for (k = 0; k < columns; ++k)
    for (i = r; i < rows; ++i) out[i] += *w++ * x[k];
}
"""

QUANTISED = """
/* The same in int8: x is rounded by the largest of its numbers, each row of W has a scale of its own. Sums are integers, beyond
   an int of 16 bits. */
static void product8(int rows, int columns, const signed char *w, const float *scale, const float *start, const float *x,
                     int *restrict q, int32_t *restrict sum, float *restrict out) {
  float largest = 0.0f, step, inverse;
  int r, k, i, finite = 1;
  for (k = 0; k < columns; ++k) {
    const float size = fabsf(x[k]);
    if (!(size <= 3.0e38f)) finite = 0;
    if (size > largest) largest = size;
  }
  step = largest < 1.0e-30f ? 0.0f : largest / 127.0f;
  inverse = largest < 1.0e-30f ? 0.0f : 127.0f / largest;
  if (!finite) {
    for (r = 0; r < rows; ++r) out[r] = (float)NAN;
    return;
  }
  for (k = 0; k < columns; ++k) q[k] = (int)rintf(x[k] * inverse); /* ties to even */
  for (r = 0; r + 32 <= rows; r += 32, w += 32L * columns) {
    int32_t own[32];
    for (i = 0; i < 32; ++i) own[i] = 0;
    for (k = 0; k < columns; ++k) {
      const signed char *const column = w + 32L * k;
      const int by = q[k];
      for (i = 0; i < 32; ++i) own[i] += column[i] * by;
    }
    for (i = 0; i < 32; ++i) sum[r + i] = own[i];
  }
  for (i = r; i < rows; ++i) sum[i] = 0;
  for (k = 0; k < columns; ++k)
    for (i = r; i < rows; ++i) sum[i] += *w++ * q[k];
  for (r = 0; r < rows; ++r) out[r] = (start ? start[r] : 0.0f) + (step * scale[r]) * (float)sum[r];
}
"""

EXPONENTIAL = """
/* e^x as 2^n e^r with |r| <= log(2)/2: the low bits of the sum are n. No branch, so that loops become vectors. NaN stays NaN. */
static float exponential(float x) {
  float shifted, n, r, p, power;
  uint32_t bits;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  n = rintf(x * 1.44269504f);
  shifted = n + 12582912.0f;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

"""

SIGMOID = """
static float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

"""

SQUASH = """
/* A series where 1 - e^(-2|x|) would cancel. */
static float squash(float x) {
  const float size = fabsf(x), square = x * x, power = exponential(-2.0f * size), large = (1.0f - power) / (1.0f + power);
  float series = -1382.0f / 155925.0f * square + 62.0f / 2835.0f;
  series = series * square - 17.0f / 315.0f;
  series = series * square + 2.0f / 15.0f;
  series = series * square - 1.0f / 3.0f;
  series = x + x * square * series;
  return size < 0.3f ? series : x < 0.0f ? -large : large;
}
"""

NORMALISE = """
/* a = gain (a - mean) / sqrt(variance + 1e-5) + shift. */
static void normalise(int count, const float *gain, const float *shift, float *a) {
  float mean = 0.0f, variance = 0.0f, scale;
  int j;
  for (j = 0; j < count; ++j) mean += a[j];
  mean /= (float)count;
  for (j = 0; j < count; ++j) variance += (a[j] - mean) * (a[j] - mean);
  scale = 1.0f / sqrtf(variance / (float)count + 1.0e-5f);
  for (j = 0; j < count; ++j) a[j] = (a[j] - mean) * scale * gain[j] + (shift ? shift[j] : 0.0f);
}
"""


def in_blocks(weight: NDArray[Any]) -> NDArray[Any]:
    """Return a weight (rows, columns) as the products read it: blocks of rows, each by columns, and what is left likewise."""
    whole = len(weight) // BLOCK * BLOCK
    blocks = weight[:whole].reshape(-1, BLOCK, weight.shape[1]).transpose(0, 2, 1)
    return np.concatenate([blocks.ravel(), weight[whole:].T.ravel()])


def floats(values: NDArray[np.float32]) -> list[str]:
    """Return float32 numbers as C writes them; nine digits tell each from all others."""
    texts = (f"{value:.9g}" for value in values.ravel().tolist())
    return [f"{text}f" if "." in text or "e" in text else f"{text}.0f" for text in texts]


def array(kind: str, name: str, count: int, texts: Iterable[str]) -> str:
    """Return the definition of a constant array of so many numbers."""
    lines, line = [], ""
    for text in texts:
        if len(line) + len(text) > 118:
            lines.append(line)
            line = ""
        line += text + ","
    return f"static const {kind} {name}[{count}] = {{\n" + "\n".join([*lines, line.rstrip(",")]) + "};\n"


def float_array(name: str, values: NDArray[np.float32]) -> str:
    """Return the definition of an array of float32."""
    return array("float", name, values.size, chain.from_iterable(map(floats, _pieces(values))))


def byte_array(name: str, values: NDArray[np.int8]) -> str:
    """Return the definition of an array of int8."""
    return array("signed char", name, values.size, (str(v) for piece in _pieces(values) for v in piece.tolist()))


def _pieces(values: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut an array in parts that take little memory as Python's numbers, or as texts."""
    return np.array_split(values.ravel(), values.size // 65536 + 1)


def text_array(name: str, texts: list[bytes]) -> str:
    """Return the definitions of an array of texts, and of how many bytes each has."""
    plain = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz ,.:;!-+*/=()<>[]{}#_$%&'~^|@`")
    long, written = [], []
    for place, text in enumerate(texts):
        if len(text) > _LONGEST_LITERAL:
            numbers = (str(b) for b in (*text, 0))
            long.append(array("unsigned char", f"{name}_text_{place}", len(text) + 1, numbers))
            written.append(f"(const char *){name}_text_{place}")
        else:
            written.append('"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in text) + '"')
    rows, sizes = ",\n".join(written), ",".join(str(len(text)) for text in texts)
    return "".join(long) + (
        f"const char *const {name}_text[{len(texts)}] = {{\n{rows}}};\n"
        f"const unsigned short {name}_lengths[{len(texts)}] = {{{sizes}}};\n"
    )
