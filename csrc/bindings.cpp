// What Python sees: a Layout, and the passes over it. Arrays come as addresses (`tensor.data_ptr()`, 0 for none), because handing
// over ten tensors costs 38 microseconds and ten integers one; request.py has checked them. Each is given by its name in a call
// (request.h), and stands there once: the lists of names below make parameters, keywords and assignments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cotangents.h"
#include "denormals.h"
#include "dispatch.h"
#include "memory.h"
#include "pass.h"
#include "rows.h"
#include "signals.h"
#include "stream_bindings.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace throughtime;

namespace {

const InstructionSet* active = nullptr;

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const InstructionSet* set : instruction_sets()) all.emplace_back(set->name);
  return all;
}

void use(const std::string& name) {
  for (const InstructionSet* set : instruction_sets())
    if (set->name == name) return void(active = set);
  throw std::invalid_argument("instruction set " + name + " isn't in this build, or this machine can't run it");
}

template <class E>
const Kernels<E>& kernels(const InstructionSet& set) {
  if constexpr (std::is_same_v<E, float>)
    return set.f32;
  else if constexpr (std::is_same_v<E, double>)
    return set.f64;
  else
    return set.bf16;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;

void check(bool done) {
  if (!done) throw std::bad_alloc();
}

// Weights packed for one of the passes, in memory of their own. A part of no elements is null.
template <class E>
class Packed {
  using T = Arithmetic<E>;

 public:
  PackedWeights<E> places;
  E* place_ih;
  PassWeights<E> weights{};
  Weight<E> weight_ih{};

  Packed(PackedSizes sizes, long ih)
      : block_(Block::bytes<E>(sizes.weight_hh) + Block::bytes<E>(sizes.weight_last) + Block::bytes<E>(sizes.weight_hr) +
               Block::bytes<T>(sizes.bias) + Block::bytes<E>(ih)) {
    check(block_.is_there());
    places.hh = block_.take<E>(sizes.weight_hh);
    places.last = block_.take<E>(sizes.weight_last);
    places.hr = block_.take<E>(sizes.weight_hr);
    places.bias = block_.take<T>(sizes.bias);
    place_ih = block_.take<E>(ih);
  }

  template <class Call>
  void give_to(Call& call) const {
    call.weight_hh = weights.hh;
    call.weight_last = weights.last;
    call.weight_hr = weights.hr;
  }

 private:
  Block block_;
};

using Steps = std::vector<std::tuple<long, long, long, long>>;

std::vector<Stretch> stretches(const Steps& steps) {
  std::vector<Stretch> all;
  for (const auto& [begin, end, first_row, last_row] : steps) all.push_back({begin, end, first_row, last_row});
  return all;
}

#define PARAMETER(name) Address name,
#define KEYWORD(name) nb::arg(#name) = 0,
#define ASSIGN(name) set(to.name, name);

template <class T>
void set(T*& field, Address address) {
  field = at<T>(address);
}

#define LAYOUT_ARRAYS(F) F(rows) F(first_row) F(order) F(reset)
#define WEIGHTS(F) F(weight_ih) F(weight_hh) F(bias_ih) F(bias_hh) F(weight_hr)
#define VARIANT_WEIGHTS(F) F(weight_ch) F(gain_ih) F(gain_hh) F(gain_c) F(shift_c)
#define VARIANT_ARRAYS(F) F(bias_ih) F(bias_hh) VARIANT_WEIGHTS(F) F(zoneout_h) F(zoneout_c) F(recurrent_dropout)
#define VARIANT_SUMS(F) F(bias_ih) F(bias_hh) VARIANT_WEIGHTS(F)
#define FORWARD_ARRAYS(F) F(gates) F(kept) F(w) F(u) F(norms) F(output) F(h) F(c) F(initial_h) F(initial_c)
#define BACKWARD_ARRAYS(F)                                                                                         \
  F(gates) F(kept) F(w) F(u) F(norms) F(output) F(grad_output) F(grad_h) F(grad_c) F(grad_initial_h)               \
  F(grad_initial_c) F(initial_h) F(initial_c) F(sums)
#define BACKWARD_SUMS(F) F(grad_input) F(sum_ih) F(sum_hh) F(sum_hr) F(sum_bias_ih) F(sum_bias_hh)

// What both passes read of the input: rows (., I), without gaps in a row and a stride apart, or ids.
#define INPUT_ARRAYS(F) F(x) F(ids)

// A layout, and the variant of its cell if it is one.
template <class E>
struct TypedLayout : Layout {
  using T = Arithmetic<E>;
  std::optional<Variant<E>> variant;

  const Kernels<E>& with() const { return kernels<E>(*set); }
  long gates_width() const { return gate_count * hidden; }
  bool turns() const { return !variant && facts.turned; }

  long groups() const { return with().most_groups(*this); }
  long sums_size() const { return groups() * sum_rows(*this) * sum_stride(*this); }

  Input<E> input(Address x, Address ids, long width, long stride) const {
    return {at<const E>(x), width, stride, at<const int64_t>(ids)};
  }
};

template <class E>
TypedLayout<E> layout(int cell, int gates, bool reverse, int threads, long steps, long batch, long hidden, long projected,
                      bool is_packed, long output_stride) {
  TypedLayout<E> it{};
  it.set = active;
  it.cell = cell;
  it.facts = it.set->cells[cell];
  it.gate_count = gates;
  it.reverse = reverse;
  it.threads = threads;
  it.end = it.steps = steps;
  it.batch = batch;
  it.hidden = hidden;
  it.projected = projected;
  it.is_packed = is_packed;
  it.output_stride = output_stride;
  return it;
}

// W_ih (., I), without gaps; or null.
template <class E>
std::unique_ptr<Packed<E>> pack_forward(const TypedLayout<E>& s, long input, const CellWeights<Arithmetic<E>>& weights,
                                        const Arithmetic<E>* weight_ih) {
  const Kernels<E>& with = s.with();
  const bool packs_ih = weight_ih && !with.reads_plain(s);
  auto packed = std::make_unique<Packed<E>>(with.forward_sizes(s, s.variant.has_value()),
                                            packs_ih ? with.columns_size(s.gates_width(), input) : 0);
  packed->weights = with.pack_forward(s, weights, packed->places);
  if (packs_ih) with.pack_columns(s.gates_width(), input, weight_ih, input, 1, packed->place_ih, s.threads);
  packed->weight_ih = {packed->place_ih, weight_ih, input};
  return packed;
}

template <class E>
std::unique_ptr<Packed<E>> pack_backward(const TypedLayout<E>& s, long input, const CellWeights<Arithmetic<E>>& weights,
                                         const Arithmetic<E>* weight_ih) {
  using T = Arithmetic<E>;
  const Kernels<E>& with = s.with();
  auto packed =
      std::make_unique<Packed<E>>(with.backward_sizes(s), weight_ih ? with.columns_size(input, s.gates_width()) : 0);
  packed->weights = with.pack_backward(s, weights, packed->places);
  packed->weight_ih.packed = packed->place_ih;
  if (!weight_ih) return packed;
  const long count = s.turns() ? s.gates_width() * input : 0;
  Block block(Block::bytes<T>(count));
  check(block.is_there());
  if (T* const turned = block.take<T>(count)) {
    turn_to_rows(s, input, weight_ih, turned);
    weight_ih = turned;
  }
  with.pack_columns(input, s.gates_width(), weight_ih, 1, input, packed->place_ih, s.threads);
  return packed;
}

// A torch tensor in pooled memory, or none where that is too small to be pooled.
template <class E>
std::optional<nb::ndarray<nb::pytorch>> new_array(const std::vector<size_t>& shape) {
  size_t bytes = sizeof(E);
  for (const size_t size : shape) bytes *= size;
  if (bytes < least_pooled()) return {};
  void* memory = take_memory(bytes);
  check(memory);
  nb::capsule owner(memory, [](void* it) noexcept { give_memory(it); });
  using Code = nb::dlpack::dtype_code;
  const auto code = static_cast<uint8_t>(std::is_same_v<E, Bf16> ? Code::Bfloat : Code::Float);
  const nb::dlpack::dtype dtype{code, 8 * sizeof(E), 1};
  return nb::ndarray<nb::pytorch>(memory, shape.size(), shape.data(), owner, nullptr, dtype);
}

// Run a pass, or two at once: both directions of a layer.
template <class E, class Pass>
void run(Ended (*pass)(const Kernels<E>&, const Pass* const*, int, bool (*)()), const Pass& one, const Pass* other) {
  if (other && other->loop.set != one.loop.set) {  // which another thread has changed in between
    run<E, Pass>(pass, one, nullptr);
    return run<E, Pass>(pass, *other, nullptr);
  }
  const Pass* const both[] = {&one, other};
  const IsInterrupted is_interrupted = interruption();
  Ended ended;
  {
    nb::gil_scoped_release release;
    ended = pass(kernels<E>(*one.loop.set), both, other ? 2 : 1, is_interrupted);
  }
  check(ended != Ended::out_of_memory);
  if (ended == Ended::interrupted) throw nb::python_error();
}

// A direction's weights, in the order in which a stack's calls give them.
#define NAME(name) #name,
constexpr const char* stack_weights[] = {WEIGHTS(NAME) VARIANT_WEIGHTS(NAME)};
#undef NAME
constexpr long weights_a_direction = std::size(stack_weights);

// A direction of a layer that sees whole rows, and its weights for a forward pass.
template <class E>
struct PlainDirection {
  TypedLayout<E> layout;
  std::unique_ptr<Packed<E>> packed;

  // The weights' addresses stand one after the other.
  PlainDirection(const TypedLayout<E>& s, bool is_variant, long input, const Address* addresses) : layout(s) {
    using T = Arithmetic<E>;
#define TAKE(name) const Address name = *addresses++;
    WEIGHTS(TAKE)
    VARIANT_WEIGHTS(TAKE)
#undef TAKE
    if (is_variant) {
      Variant<E> to;
      set(to.bias_ih, bias_ih), set(to.bias_hh, bias_hh);
      VARIANT_WEIGHTS(ASSIGN)
      layout.variant = to;
    }
    const CellWeights<T> weights{at<const T>(weight_hh), at<const T>(weight_hr), at<const T>(bias_ih), at<const T>(bias_hh)};
    packed = pack_forward<E>(layout, input, weights, at<const T>(weight_ih));
  }

  ForwardPass<E> pass(std::vector<Stretch> stretches, const Input<E>& input, E* output, E* h, E* c) const {
    ForwardCall<E> loop{layout};
    loop.output = output;
    loop.h = h, loop.c = c;
    loop.initial_h = h, loop.initial_c = c;  // read where resets are, of which there are none
    loop.bias = packed->places.bias;
    packed->give_to(loop);
    return {std::move(stretches), loop, layout.variant, input, packed->weight_ih, nullptr};
  }
};

// Stretches of rows that all take part in each step.
std::vector<Stretch> whole_stretches(long steps, long at_once, long batch) {
  std::vector<Stretch> all;
  for (long t = 0; t < steps; t += at_once) {
    const long end = std::min(t + at_once, steps);
    all.push_back({t, end, t * batch, end * batch});
  }
  return all;
}

// Layers on top of each other, over rows that all take part in each step, where nothing is kept for a backward pass: what the other
// calls do for each layer, in one, since of a few steps Python would take the longest part. h and c, (layers * directions, B, .),
// are the state before on entry, and after on return.
template <class E>
void forward_stack(int cell, int gates, bool is_variant, int threads, long steps, long steps_at_once, long batch, long input,
                   long hidden, long projected, int directions, Address x, const std::vector<Address>& weights, Address output,
                   Address h, Address c) {
  const long P = projected ? projected : hidden, wide = directions * P, count = weights.size() / weights_a_direction;
  if (count < 1 || count % directions || count * weights_a_direction != static_cast<long>(weights.size()))
    throw std::invalid_argument(std::to_string(weights.size()) + " weights; expected " +
                                std::to_string(weights_a_direction) + " for each direction of each layer");
  const std::vector<Stretch> ahead = whole_stretches(steps, steps_at_once, batch);
  const std::vector<Stretch> back(ahead.rbegin(), ahead.rend());
  const long between = count > directions ? steps * batch * wide : 0;
  Block block(2 * Block::bytes<E>(between));
  if (between) check(block.is_there());
  E* const outputs[] = {block.template take<E>(between), block.template take<E>(between)};
  Input<E> rows{at<const E>(x), input, input, nullptr};
  for (long layer = 0; layer * directions < count; ++layer) {
    E* const out = (layer + 1) * directions < count ? outputs[layer % 2] : at<E>(output);
    std::vector<PlainDirection<E>> own;
    std::vector<ForwardPass<E>> passes;
    for (long way = 0; way < directions; ++way) {
      const long number = layer * directions + way;
      const auto s = layout<E>(cell, gates, way == 1, threads, steps, batch, hidden, projected, false, wide);
      {
        nb::gil_scoped_release release;
        own.emplace_back(s, is_variant, rows.width, weights.data() + number * weights_a_direction);
      }
      passes.push_back(own[way].pass(way ? back : ahead, rows, out + way * P, at<E>(h) + number * batch * P,
                                     c ? at<E>(c) + number * batch * hidden : nullptr));
    }
    run<E>(run_forward<E>, passes[0], directions > 1 ? &passes[1] : nullptr);
    rows = {out, wide, wide, nullptr};
  }
}

// One layer's two passes over rows that all take part in each step, with all arrays whole and given at once: what the other calls do
// in parts, since of a few steps Python would take the longest one. Arrays of each direction stand one after the other: its weights;
// what is saved, gates and kept; its state, h and c; each may be 0.
template <class E>
struct WholeLayer {
  using T = Arithmetic<E>;
  int cell, gates, threads;
  long steps, batch, input, hidden, projected;
  const std::vector<Address>&weights, &saved;

  int directions() const { return static_cast<int>(weights.size() / weights_a_direction); }
  long width() const { return projected ? projected : hidden; }

  TypedLayout<E> direction(int way) const {
    return layout<E>(cell, gates, way == 1, threads, steps, batch, hidden, projected, false, directions() * width());
  }
  const Address* weights_of(int way) const { return weights.data() + way * weights_a_direction; }
  Input<E> rows(Address x) const { return {at<const E>(x), input, input, nullptr}; }

  // `state` is the one before on entry, and after on return.
  void forward(long at_once, Address x, Address output, const std::vector<Address>& state) const {
    std::vector<PlainDirection<E>> own;
    std::vector<ForwardPass<E>> passes;
    for (int way = 0; way < directions(); ++way) {
      {
        nb::gil_scoped_release release;
        own.emplace_back(direction(way), false, input, weights_of(way));
      }
      std::vector<Stretch> stretches = whole_stretches(steps, at_once, batch);
      if (way) std::reverse(stretches.begin(), stretches.end());
      passes.push_back(own[way].pass(std::move(stretches), rows(x), at<E>(output) + way * width(), at<E>(state[2 * way]),
                                     at<E>(state[2 * way + 1])));
      passes[way].loop.gates = at<E>(saved[2 * way]);
      passes[way].loop.kept = at<E>(saved[2 * way + 1]);
    }
    run<E>(run_forward<E>, passes[0], directions() > 1 ? &passes[1] : nullptr);
  }

  // `sums`, the weights' gradients, are written to, and each direction's gradient of the input; `grad_state` is that of the state after
  // on entry, and before on return.
  void backward(long at_once, Address x, Address output, const std::vector<Address>& initial, Address grad_output,
                const std::vector<Address>& grad_input, const std::vector<Address>& grad_state,
                const std::vector<Address>& sums) const {
    std::vector<std::unique_ptr<Packed<E>>> packed;
    std::vector<BackwardPass<E>> passes;
    for (int way = 0; way < directions(); ++way) {
      const TypedLayout<E> s = direction(way);
      {
        nb::gil_scoped_release release;
        packed.push_back(pack(s, way, grad_input[way]));
        clear_sums(s, sums.data() + way * weights_a_direction);
      }
      std::vector<Stretch> stretches = whole_stretches(steps, at_once, batch);
      if (!way) std::reverse(stretches.begin(), stretches.end());
      BackwardPass<E> pass{std::move(stretches), {s}, std::nullopt, rows(x), packed[way]->weight_ih};
      BackwardCall<E>& loop = pass.loop;
      loop.gates = at<E>(saved[2 * way]), loop.kept = at<E>(saved[2 * way + 1]);
      loop.output = at<E>(output) + way * width();
      loop.grad_output = grad_output ? at<E>(grad_output) + way * width() : nullptr;
      set(loop.grad_h, grad_state[2 * way]), set(loop.grad_c, grad_state[2 * way + 1]);
      set(loop.initial_h, initial[2 * way]), set(loop.initial_c, initial[2 * way + 1]);
      packed[way]->give_to(loop);
      set(pass.grad_input, grad_input[way]);
      take_sums(s, sums.data() + way * weights_a_direction, pass);
      passes.push_back(std::move(pass));
    }
    run<E>(run_backward<E>, passes[0], directions() > 1 ? &passes[1] : nullptr);
    for (int way = 0; way < directions(); ++way) copy_bias(passes[way], sums.data() + way * weights_a_direction);
  }

 private:
  // The weights' places among a direction's.
  enum { weight_ih, weight_hh, bias_ih, bias_hh, weight_hr };

  std::unique_ptr<Packed<E>> pack(const TypedLayout<E>& s, int way, bool needs_input) const {
    const Address* from = weights_of(way);
    const CellWeights<T> all{at<const T>(from[weight_hh]), at<const T>(from[weight_hr]), at<const T>(from[bias_ih]),
                             at<const T>(from[bias_hh])};
    return pack_backward<E>(s, input, all, needs_input ? at<const T>(from[weight_ih]) : nullptr);
  }

  void clear_sums(const TypedLayout<E>& s, const Address* sums) const {
    const long rows = s.gates_width();
    const auto clear_one = [&](Address sum, long count) {
      if (sum) clear(at<char>(sum), count * sizeof(T), threads);
    };
    clear_one(sums[weight_ih], rows * input), clear_one(sums[weight_hh], rows * width());
    clear_one(sums[bias_ih], rows), clear_one(sums[bias_hh], rows);
    clear_one(sums[weight_hr], projected * hidden);
  }

  static void take_sums(const TypedLayout<E>& s, const Address* sums, BackwardPass<E>& pass) {
    set(pass.sum_ih, sums[weight_ih]), set(pass.sum_hh, sums[weight_hh]), set(pass.sum_hr, sums[weight_hr]);
    set(pass.sum_bias_ih, sums[bias_ih]);
    if (s.facts.offset_hh) set(pass.sum_bias_hh, sums[bias_hh]);
  }

  // Where the two biases have one gradient.
  void copy_bias(const BackwardPass<E>& pass, const Address* sums) const {
    if (sums[bias_hh] && !pass.sum_bias_hh)
      memcpy(at<T>(sums[bias_hh]), pass.sum_bias_ih, sizeof(T) * pass.loop.gate_count * hidden);
  }
};

template <class E>
void bind_layout(nb::class_<TypedLayout<E>>& it) {
  using L = TypedLayout<E>;
  it.def(
        "__init__",
        [](L* self, int cell, int gates, bool reverse, int threads, long steps, long batch, long hidden, long projected,
           LAYOUT_ARRAYS(PARAMETER) bool is_packed, long output_stride) {
          L to = layout<E>(cell, gates, reverse, threads, steps, batch, hidden, projected, is_packed, output_stride);
          LAYOUT_ARRAYS(ASSIGN)
          new (self) L(to);
        },
        nb::kw_only(), "cell"_a, "gates"_a, "reverse"_a, "threads"_a, "steps"_a, "batch"_a, "hidden"_a, "projected"_a,
        LAYOUT_ARRAYS(KEYWORD) "is_packed"_a, "output_stride"_a)
      .def(
          "vary",
          [](L& self, VARIANT_ARRAYS(PARAMETER) double share_h, double share_c) {
            Variant<E> to;
            VARIANT_ARRAYS(ASSIGN)
            to.share_h = static_cast<Arithmetic<E>>(share_h);
            to.share_c = static_cast<Arithmetic<E>>(share_c);
            self.variant = to;
          },
          nb::kw_only(), VARIANT_ARRAYS(KEYWORD) "share_h"_a = 0.0, "share_c"_a = 0.0)
      .def_prop_ro("sums_size", &L::sums_size);
}

template <class E>
void bind_packing(nb::class_<TypedLayout<E>>& it) {
  using L = TypedLayout<E>;
  using T = Arithmetic<E>;
  const auto pack = [](auto function) {
    return [function](const L& s, WEIGHTS(PARAMETER) long input) {
      nb::gil_scoped_release release;
      const CellWeights<T> weights{at<const T>(weight_hh), at<const T>(weight_hr), at<const T>(bias_ih), at<const T>(bias_hh)};
      return function(s, input, weights, at<const T>(weight_ih));
    };
  };
  it.def("pack_forward", pack(pack_forward<E>), nb::kw_only(), WEIGHTS(KEYWORD) "input"_a)
      .def("pack_backward", pack(pack_backward<E>), nb::kw_only(), WEIGHTS(KEYWORD) "input"_a);
}

template <class E>
void bind_passes(nb::class_<TypedLayout<E>>& it) {
  using L = TypedLayout<E>;
  it.def(
        "forward_pass",
        [](const L& s, const Steps& steps, INPUT_ARRAYS(PARAMETER) long width, long stride, Address table,
           FORWARD_ARRAYS(PARAMETER) long first_kept_row, const Packed<E>& packed) {
          ForwardCall<E> to{s};
          FORWARD_ARRAYS(ASSIGN)
          to.first_kept_row = first_kept_row;
          to.bias = packed.places.bias;
          packed.give_to(to);
          return ForwardPass<E>{stretches(steps), to, s.variant, s.input(x, ids, width, stride), packed.weight_ih,
                                at<const Arithmetic<E>>(table)};
        },
        "steps"_a, nb::kw_only(), INPUT_ARRAYS(KEYWORD) "width"_a, "stride"_a, "table"_a = 0,
        FORWARD_ARRAYS(KEYWORD) "first_kept_row"_a, "packed"_a)
      .def(
          "backward_pass",
          [](const L& s, const Steps& steps, INPUT_ARRAYS(PARAMETER) long width, long stride,
             BACKWARD_ARRAYS(PARAMETER) BACKWARD_SUMS(PARAMETER) long first_kept_row, const Packed<E>& packed) {
            BackwardPass<E> pass{stretches(steps), {s}, s.variant, s.input(x, ids, width, stride), packed.weight_ih};
            {
              BackwardCall<E>& to = pass.loop;
              BACKWARD_ARRAYS(ASSIGN)
              to.first_kept_row = first_kept_row;
              packed.give_to(to);
            }
            BackwardPass<E>& to = pass;
            BACKWARD_SUMS(ASSIGN)
            return pass;
          },
          "steps"_a, nb::kw_only(), INPUT_ARRAYS(KEYWORD) "width"_a, "stride"_a,
          BACKWARD_ARRAYS(KEYWORD) BACKWARD_SUMS(KEYWORD) "first_kept_row"_a, "packed"_a)
      .def_static(
          "forward",
          [](const ForwardPass<E>& one, const ForwardPass<E>* other) { run<E>(run_forward<E>, one, other); }, "one"_a,
          "other"_a.none() = nb::none())
      .def_static(
          "backward",
          [](const BackwardPass<E>& one, const BackwardPass<E>* other) { run<E>(run_backward<E>, one, other); },
          "one"_a, "other"_a.none() = nb::none());
}

#define WHOLE_SIZES                                                                                              \
  "cell"_a, "gates"_a, "threads"_a, "steps"_a, "batch"_a, "input"_a, "hidden"_a, "projected"_a, "weights"_a,    \
      "saved"_a, "at_once"_a

template <class E>
void bind_whole(nb::class_<TypedLayout<E>>& it) {
  using Addresses = std::vector<Address>;
  it.def_static(
        "forward_whole",
        [](int cell, int gates, int threads, long steps, long batch, long input, long hidden, long projected,
           const Addresses& weights, const Addresses& saved, long at_once, Address x, Address output, const Addresses& state) {
          WholeLayer<E>{cell, gates, threads, steps, batch, input, hidden, projected, weights, saved}.forward(at_once, x, output,
                                                                                                              state);
        },
        nb::kw_only(), WHOLE_SIZES, "x"_a, "output"_a, "state"_a)
      .def_static(
          "backward_whole",
          [](int cell, int gates, int threads, long steps, long batch, long input, long hidden, long projected,
             const Addresses& weights, const Addresses& saved, long at_once, Address x, Address output,
             const Addresses& initial, Address grad_output, const Addresses& grad_input, const Addresses& grad_state,
             const Addresses& sums) {
            WholeLayer<E>{cell, gates, threads, steps, batch, input, hidden, projected, weights, saved}.backward(
                at_once, x, output, initial, grad_output, grad_input, grad_state, sums);
          },
          nb::kw_only(), WHOLE_SIZES, "x"_a, "output"_a, "initial"_a, "grad_output"_a, "grad_input"_a, "grad_state"_a,
          "sums"_a);
}

template <class E>
void bind(nb::module_& module, const char* name) {
  using T = Arithmetic<E>;
  using L = TypedLayout<E>;
  nb::class_<L> layout(module, name);
  nb::class_<ForwardPass<E>>(layout, "ForwardPass");
  nb::class_<BackwardPass<E>>(layout, "BackwardPass");
  nb::class_<Packed<E>>(layout, "Packed");
  bind_layout(layout);
  bind_packing(layout);
  bind_passes(layout);
  if constexpr (std::is_same_v<E, T>) bind_whole(layout);
  layout
      .def(
          "add_up",
          [](const L& s, VARIANT_SUMS(PARAMETER) Address sums) {
            VariantSums<T> to;
            VARIANT_SUMS(ASSIGN)
            nb::gil_scoped_release release;
            const FlushDenormals flush;
            add_up(s, s.groups(), at<const T>(sums), to);
          },
          nb::kw_only(), VARIANT_SUMS(KEYWORD) "sums"_a)
      .def_static("new_array", &new_array<E>, "shape"_a);
}

#undef PARAMETER
#undef KEYWORD
#undef ASSIGN

template <class E>
void bind_stack(nb::module_& module, const char* name) {
  module.def(name, &forward_stack<E>, "cell"_a, "gates"_a, "is_variant"_a, "threads"_a, "steps"_a, "steps_at_once"_a, "batch"_a,
             "input"_a, "hidden"_a, "projected"_a, "directions"_a, "x"_a, "weights"_a, "output"_a, "h"_a, "c"_a);
}

template <class T>
void bind_cotangents(nb::module_& module, const char* name, bool (*InstructionSet::*norms)(const Cotangents<T>&)) {
  module.def(
      name,
      [norms](int threads, bool reverse, long steps, long batch, long hidden, long gates, long losses, long lags,
              Address loss_steps, Address h_to_a, Address c_to_a, Address h_to_h, Address h_to_c, Address c_to_c,
              Address weight_hh, Address grad_output, Address out) {
        const InstructionSet& set = *active;
        nb::gil_scoped_release release;
        const long depth = gates * hidden, size = kernels<T>(set).columns_size(hidden, depth);
        Block block(Block::bytes<T>(size));
        check(block.is_there());
        T* const packed = block.take<T>(size);
        kernels<T>(set).pack_columns(hidden, depth, at<const T>(weight_hh), 1, hidden, packed, threads);
        check((set.*norms)({threads, reverse, steps, batch, hidden, gates, losses, lags,
                                at<const int64_t>(loss_steps), at<const T>(h_to_a), at<const T>(c_to_a),
                                at<const T>(h_to_h), at<const T>(h_to_c), at<const T>(c_to_c), packed,
                                at<const T>(grad_output), at<T>(out)}));
      },
      "threads"_a, "reverse"_a, "steps"_a, "batch"_a, "hidden"_a, "gates"_a, "losses"_a, "lags"_a, "loss_steps"_a,
      "h_to_a"_a, "c_to_a"_a, "h_to_h"_a, "h_to_c"_a, "c_to_c"_a, "weight_hh"_a, "grad_output"_a, "norms"_a);
}

}  // namespace

NB_MODULE(_native, module) {
  active = instruction_sets().front();
  find_main_thread();
  module.def("instruction_sets", &names, "Instruction sets that this machine can run, the fastest first.");
  module.def("unbuilt_instruction_sets", &unbuilt_instruction_sets,
             "Faster ones that this machine could run, but the compiler didn't know.");
  module.def("instruction_set", [] { return std::string(active->name); }, "The one in use.");
  module.def("use_instruction_set", &use, "name"_a, "Use another one, in the whole process.");
  module.def("memory_use", [] {
    const MemoryUse use = memory_use();
    return std::make_tuple(use.used, use.idle);
  });
  module.def("release_memory", &release_memory, nb::call_guard<nb::gil_scoped_release>());
  module.def("least_pooled", &least_pooled);
  module.def("pool_from", &pool_from, "bytes"_a);
  module.def("fill_blocks", &fill_blocks, "value"_a);
  module.def("use_own_threads", &use_own_threads, "value"_a);
  module.def("meetings", [] {
    const Meetings met = meetings();
    return std::make_tuple(met.teams, met.alone);
  });
  module.def("flush_denormals", &flush_denormals, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  module.def("restore_denormals", &restore_denormals, "threads"_a, "before"_a, nb::call_guard<nb::gil_scoped_release>());
  module.def("clear", [](uintptr_t array, long bytes, int threads) { clear(at<char>(array), bytes, threads); },
             nb::call_guard<nb::gil_scoped_release>());
  module.def("plan_rows", [](Address lengths, long batch, long steps, Address order, Address rows, Address first_row,
                             Address index) {
    check(plan_rows(at<const int64_t>(lengths), batch, steps, at<int64_t>(order), at<int64_t>(rows),
                    at<int64_t>(first_row), at<int64_t>(index)));
  }, nb::call_guard<nb::gil_scoped_release>());
  module.def("cells", [] {
    std::vector<std::string> all;
    for (int i = 0; i < active->cell_count; ++i) all.emplace_back(active->cells[i].name);
    return all;
  }, "Names of the cells, by their number.");
  module.def("saved", [](int cell, int gates, bool is_variant, bool is_normalised) {
    std::vector<std::tuple<std::string, long, long, bool>> all;
    for (const Saved& it : saved(active->cells[cell], gates, is_variant, is_normalised))
      all.emplace_back(it.name, it.hiddens, it.others, it.is_wide);
    return all;
  }, "cell"_a, "gates"_a, "is_variant"_a, "is_normalised"_a,
             "Arrays that a forward pass leaves: name, columns of H and others, whether they are as wide as arithmetic.");
  module.def("gradient_gates", [](int cell, int gates, bool is_variant) {
    return gradient_gates(active->cells[cell], gates, is_variant);
  }, "cell"_a, "gates"_a, "is_variant"_a, "How many H of gradients the backward loop writes for a row.");
  module.def("has_own_bias_hh", [](int cell) { return active->cells[cell].offset_hh > 0; }, "cell"_a,
             "Whether the gradients of the two biases differ.");
  module.def("stack_weights", [] { return std::vector<std::string>(std::begin(stack_weights), std::end(stack_weights)); },
             "A direction's weights, in the order in which `forward_stack` takes them.");
  bind_stack<float>(module, "forward_stack_f32");
  bind_stack<double>(module, "forward_stack_f64");
  bind<float>(module, "LayoutF32");
  bind<double>(module, "LayoutF64");
  bind<Bf16>(module, "LayoutBf16");
  bind_cotangents<float>(module, "cotangent_norms_f32", &InstructionSet::cotangent_norms_f32);
  bind_cotangents<double>(module, "cotangent_norms_f64", &InstructionSet::cotangent_norms_f64);
  bind_streams(module, &active);
}
