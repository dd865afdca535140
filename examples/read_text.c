/* Read a text from stdin, say how well a language model predicts it, and write on.

     throughtime export run model.c
     cc -std=c99 -O3 -march=native -DMODEL='"model.c"' examples/read_text.c -o read_text -lm
     printf 'ROMEO:\n' | ./read_text 300

   The run is one of characters or bytes, and model.c is named so: its names begin with model. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include MODEL

static struct model state;
static float logits[MODEL_OUTPUTS];

/* The token that these bytes begin with, the longest; -1 where there is none. */
static int token_of(const char *at, size_t left, size_t *length) {
  int id, found = -1;
  *length = 0;
  for (id = 0; id < MODEL_TOKENS; ++id) {
    const size_t size = model_lengths[id];
    if (size > *length && size <= left && !memcmp(model_text[id], at, size)) {
      found = id;
      *length = size;
    }
  }
  return found;
}

/* log(sum(exp(x))), without overflow. */
static double log_sum(const float *x, double scale) {
  double largest = x[0], sum = 0;
  int k;
  for (k = 1; k < MODEL_OUTPUTS; ++k)
    if (x[k] > largest) largest = x[k];
  for (k = 0; k < MODEL_OUTPUTS; ++k) sum += exp((x[k] - largest) * scale);
  return largest * scale + log(sum);
}

int main(int count, char **given) {
  static char text[1 << 20];
  const size_t size = fread(text, 1, sizeof text, stdin);
  const long more = count > 1 ? atol(given[1]) : 0;
  const double temperature = 0.8;
  size_t at = 0, length;
  long predicted = 0, k;
  double nats = 0;
  unsigned long random = 1;

  if (size == sizeof text && getchar() != EOF) {
    fprintf(stderr, "the text is longer than %lu bytes\n", (unsigned long)sizeof text);
    return 2;
  }
  model_reset(&state);
  while (at < size) {
    const int id = token_of(text + at, size - at, &length);
    if (id < 0) {
      fprintf(stderr, "byte %lu: the model doesn't know this character\n", (unsigned long)at);
      return 2;
    }
    if (at) {
      nats += log_sum(logits, 1) - logits[id];
      ++predicted;
    }
    model_step(&state, id, logits);
    at += length;
  }
  if (predicted) fprintf(stderr, "%.4f nats per token over %ld tokens\n", nats / predicted, predicted);
  for (k = 0; at && k < more; ++k) {
    const double all = log_sum(logits, 1 / temperature);
    double left;
    int id = 0;
    random = (random * 1103515245UL + 12345UL) & 0x7fffffffUL;
    left = random / 2147483648.0;
    for (; id < MODEL_OUTPUTS - 1; ++id) {
      left -= exp(logits[id] / temperature - all);
      if (left < 0) break;
    }
    fwrite(model_text[id], 1, model_lengths[id], stdout);
    model_step(&state, id, logits);
  }
  if (at && more > 0) putchar('\n');
  return 0;
}
