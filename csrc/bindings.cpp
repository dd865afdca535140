// What Python sees: a Layout, and the passes over it. Arrays come as addresses (`tensor.data_ptr()`, 0 for none),
// because handing over ten tensors costs 38 microseconds and ten integers one; request.py has checked them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cotangents.h"
#include "denormals.h"
#include "dispatch.h"
#include "memory.h"
#include "pass.h"
#include "rows.h"
#include "stream_bindings.h"
#include "threads.h"
#include "variants.h"

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
const Kernels<E>& kernels();
template <>
const Kernels<float>& kernels() {
  return active->f32;
}
template <>
const Kernels<double>& kernels() {
  return active->f64;
}
template <>
const Kernels<Bf16>& kernels() {
  return active->bf16;
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
  E *weight_hh, *weight_n, *weight_hr, *weight_ih;
  T* bias;

  Packed(PackedSizes sizes, long ih)
      : block_(Block::bytes<E>(sizes.weight_hh) + Block::bytes<E>(sizes.weight_n) + Block::bytes<E>(sizes.weight_hr) +
               Block::bytes<E>(ih) + Block::bytes<T>(sizes.bias)) {
    check(block_.is_there());
    weight_hh = block_.take<E>(sizes.weight_hh);
    weight_n = block_.take<E>(sizes.weight_n);
    weight_hr = block_.take<E>(sizes.weight_hr);
    weight_ih = block_.take<E>(ih);
    bias = block_.take<T>(sizes.bias);
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

template <class E>
struct TypedLayout : Layout {
  using T = Arithmetic<E>;

  TypedLayout(int cell, bool reverse, int threads, long steps, long batch, long hidden, long projected, Address rows,
              Address first_row, Address order, Address reset, bool is_packed, long output_stride)
      : Layout{static_cast<Cell>(cell), reverse, threads, 0, steps, steps, batch, hidden, projected,
               at<const int64_t>(rows), at<const int64_t>(first_row), at<const int64_t>(order),
               at<const uint8_t>(reset), is_packed, output_stride} {}

  // W_ih (., I), without gaps; or null.
  std::unique_ptr<Packed<E>> pack_forward(Address weight_ih, long input, Address weight_hh, Address weight_hr,
                                          Address bias_ih, Address bias_hh) const {
    nb::gil_scoped_release release;
    const long width = gate_count(cell) * hidden;
    const Kernels<E>& with = kernels<E>();
    auto packed = std::make_unique<Packed<E>>(with.forward_sizes(*this), weight_ih ? with.columns_size(width, input) : 0);
    with.pack_forward(*this, at<const T>(weight_hh), at<const T>(weight_hr), at<const T>(bias_ih), at<const T>(bias_hh),
                      packed->weight_hh, packed->weight_n, packed->weight_hr, packed->bias);
    if (packed->weight_ih) with.pack_columns(width, input, at<const T>(weight_ih), input, 1, packed->weight_ih, threads);
    return packed;
  }

  std::unique_ptr<Packed<E>> pack_backward(Address weight_ih, long input, Address weight_hh, Address weight_hr) const {
    nb::gil_scoped_release release;
    const long width = gate_count(cell) * hidden;
    const Kernels<E>& with = kernels<E>();
    auto packed = std::make_unique<Packed<E>>(with.backward_sizes(*this), weight_ih ? with.columns_size(input, width) : 0);
    with.pack_backward(*this, at<const T>(weight_hh), at<const T>(weight_hr), packed->weight_hh, packed->weight_n,
                       packed->weight_hr);
    if (packed->weight_ih) with.pack_columns(input, width, at<const T>(weight_ih), 1, input, packed->weight_ih, threads);
    return packed;
  }

  ForwardPass<E> forward_pass(const Steps& steps, Address x, long input, long x_stride, Address ids, Address table,
                              long first_row, Address gates, Address kept, Address output, Address h, Address c,
                              Address initial_h, Address initial_c, const Packed<E>& packed) const {
    const Forward<E> loop{*this, nullptr, at<E>(gates), first_row, at<E>(kept), at<E>(output), at<T>(h), at<T>(c),
                          at<const E>(initial_h), at<const E>(initial_c), packed.weight_hh, packed.weight_n,
                          packed.weight_hr, packed.bias, nullptr};
    return {stretches(steps), loop, {at<const E>(x), input, x_stride, at<const int64_t>(ids)}, packed.weight_ih,
            at<const T>(table)};
  }

  BackwardPass<E> backward_pass(const Steps& steps, Address x, long input, long x_stride, Address ids, long first_row,
                                Address gates, Address kept, Address output, Address grad_output, Address grad_h,
                                Address grad_c, Address grad_initial_h, Address grad_initial_c, Address initial_h,
                                Address initial_c, const Packed<E>& packed, Address grad_input, Address sum_ih,
                                Address sum_hh, Address sum_hr, Address sum_bias_ih, Address sum_bias_hh) const {
    Backward<E> loop{*this};
    loop.first_row = first_row;
    loop.gates = at<const E>(gates);
    loop.kept = at<const E>(kept);
    loop.output = at<const E>(output);
    loop.grad_output = at<const E>(grad_output);
    loop.grad_h = at<T>(grad_h);
    loop.grad_c = at<T>(grad_c);
    loop.grad_initial_h = at<T>(grad_initial_h);
    loop.grad_initial_c = at<T>(grad_initial_c);
    loop.initial_h = at<const E>(initial_h);
    loop.initial_c = at<const E>(initial_c);
    loop.weight_hh = packed.weight_hh;
    loop.weight_n = packed.weight_n;
    loop.weight_hr = packed.weight_hr;
    return {stretches(steps), loop, {at<const E>(x), input, x_stride, at<const int64_t>(ids)}, packed.weight_ih,
            at<E>(grad_input), at<T>(sum_ih), at<T>(sum_hh), at<T>(sum_hr), at<T>(sum_bias_ih), at<T>(sum_bias_hh)};
  }
};

// A one-dimensional torch tensor in pooled memory.
template <class T>
nb::ndarray<nb::pytorch, T, nb::ndim<1>> new_array(size_t count) {
  void* memory = take_memory(count * sizeof(T));
  check(memory);
  nb::capsule owner(memory, [](void* it) noexcept { give_memory(it); });
  return {memory, {count}, owner};
}

unsigned long main_thread = 0;  // Python's, the only one in which handlers run

// Whether a signal's handler has raised, as Ctrl-C's does: a call of ours would else be over before Python looks.
bool signal_has_raised() {
  nb::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// Elsewhere nothing is asked: a thread that wants the GIL while Python ends is ended itself, and with it the process.
bool nothing_has_raised() { return false; }

// Run a pass, or two at once: both directions of a layer.
template <class E, class Pass>
void run(Ended (*pass)(const Kernels<E>&, const Pass* const*, int, bool (*)()), const Pass& one, const Pass* other) {
  const Pass* const both[] = {&one, other};
  const bool hears_signals = PyThread_get_thread_ident() == main_thread;
  Ended ended;
  {
    nb::gil_scoped_release release;
    ended = pass(kernels<E>(), both, other ? 2 : 1, hears_signals ? signal_has_raised : nothing_has_raised);
  }
  check(ended != Ended::out_of_memory);
  if (ended == Ended::interrupted) throw nb::python_error();
}

template <class E>
void bind(nb::module_& module, const char* name) {
  using T = Arithmetic<E>;
  using L = TypedLayout<E>;
  nb::class_<L> layout(module, name);
  nb::class_<ForwardPass<E>>(layout, "ForwardPass");
  nb::class_<BackwardPass<E>>(layout, "BackwardPass");
  nb::class_<Packed<E>>(layout, "Packed");
  layout
      .def(nb::init<int, bool, int, long, long, long, long, Address, Address, Address, Address, bool, long>(), "cell"_a,
           "reverse"_a, "threads"_a, "steps"_a, "batch"_a, "hidden"_a, "projected"_a, "rows"_a, "first_row"_a,
           "order"_a, "reset"_a, "is_packed"_a, "output_stride"_a)
      .def("pack_forward", &L::pack_forward)
      .def("pack_backward", &L::pack_backward)
      .def("forward_pass", &L::forward_pass)
      .def("backward_pass", &L::backward_pass)
      .def_static(
          "forward",
          [](const ForwardPass<E>& one, const ForwardPass<E>* other) { run<E>(run_forward<E>, one, other); }, "one"_a,
          "other"_a.none() = nb::none())
      .def_static(
          "backward",
          [](const BackwardPass<E>& one, const BackwardPass<E>* other) { run<E>(run_backward<E>, one, other); },
          "one"_a, "other"_a.none() = nb::none())
      .def_static("new_array", &new_array<T>, "count"_a)  // of the arithmetic's type
      .def_static("columns_size", [](long columns, long depth) { return kernels<E>().columns_size(columns, depth); })
      .def_static("pack_columns",
                  [](long columns, long depth, Address source, long column_stride, long depth_stride, Address packed,
                     int threads) {
                    nb::gil_scoped_release release;
                    kernels<E>().pack_columns(columns, depth, at<const T>(source), column_stride, depth_stride,
                                              at<E>(packed), threads);
                  })
      .def_static("multiply_rows",
                  [](long rows, long depth, long columns, Address a, long a_stride, Address packed, Address out,
                     long out_stride, int threads) {
                    nb::gil_scoped_release release;
                    kernels<E>().multiply_rows_and_round(rows, depth, columns, at<const E>(a), a_stride,
                                                         at<const E>(packed), at<E>(out), out_stride, threads);
                  })
      .def_static("add_outer", [](long rows, long left, long right, Address a, long a_stride, Address b, long b_stride,
                                  Address sum, int threads) {
        nb::gil_scoped_release release;
        check(kernels<E>().add_outer(rows, left, right, at<const E>(a), a_stride, at<const E>(b), b_stride, at<T>(sum),
                                     nullptr, threads));
      })
      .def_static("add_by_id", [](long rows, long columns, Address a, long a_stride, Address ids, Address table,
                                  int threads) {
        nb::gil_scoped_release release;
        kernels<E>().add_by_id(rows, columns, at<const E>(a), a_stride, at<const int64_t>(ids), at<T>(table), threads);
      });
}

template <class T>
const VariantKernels<T>& variant_kernels();
template <>
const VariantKernels<float>& variant_kernels() {
  return *active->variants_f32;
}
template <>
const VariantKernels<double>& variant_kernels() {
  return *active->variants_f64;
}

// A field that holds an address, and is written as one.
template <class C, class P>
void bind_address(nb::class_<C>& of, const char* name, P* C::*field) {
  of.def_prop_rw(
      name, [field](const C& c) { return reinterpret_cast<Address>(c.*field); },
      [field](C& c, Address address) { c.*field = at<P>(address); });
}

// A Variant is made of a Layout; then its fields are set, and the passes are run over some steps.
template <class T>
void bind_variant(nb::module_& module, const char* name) {
  using C = Variant<T>;
  nb::class_<C> it(module, name);
  it.def("__init__", [](C* c, const TypedLayout<T>& layout) { new (c) C(layout); })
      .def_rw("begin", &C::begin)
      .def_rw("end", &C::end)
      .def_rw("is_coupled", &C::is_coupled)
      .def_rw("kept_h", &C::kept_h)
      .def_rw("kept_c", &C::kept_c)
      .def_rw("first_row", &C::first_row)
      .def_rw("first_grad_row", &C::first_grad_row)
      .def_rw("grad_stride", &C::grad_stride)
      .def_rw("sum_stride", &C::sum_stride)
      .def_prop_ro("sum_rows", &C::sum_rows)
      .def_prop_ro("most_groups", [](const C& c) { return variant_kernels<T>().most_groups(c); })
      .def("forward",
           [](const C& c) {
             nb::gil_scoped_release release;
             check(variant_kernels<T>().forward(c));
           })
      .def("backward", [](const C& c) {
        nb::gil_scoped_release release;
        check(variant_kernels<T>().backward(c));
      });
#define THROUGHTIME_ADDRESS(field) bind_address(it, #field, &C::field);
  THROUGHTIME_ADDRESS(bias_ih)
  THROUGHTIME_ADDRESS(bias_hh)
  THROUGHTIME_ADDRESS(weight_ch)
  THROUGHTIME_ADDRESS(gain_ih)
  THROUGHTIME_ADDRESS(gain_hh)
  THROUGHTIME_ADDRESS(gain_c)
  THROUGHTIME_ADDRESS(shift_c)
  THROUGHTIME_ADDRESS(weight_hh)
  THROUGHTIME_ADDRESS(weight_n)
  THROUGHTIME_ADDRESS(weight_hr)
  THROUGHTIME_ADDRESS(zoneout_h)
  THROUGHTIME_ADDRESS(zoneout_c)
  THROUGHTIME_ADDRESS(recurrent_dropout)
  THROUGHTIME_ADDRESS(initial_h)
  THROUGHTIME_ADDRESS(initial_c)
  THROUGHTIME_ADDRESS(x)
  THROUGHTIME_ADDRESS(gates)
  THROUGHTIME_ADDRESS(u)
  THROUGHTIME_ADDRESS(norms)
  THROUGHTIME_ADDRESS(kept)
  THROUGHTIME_ADDRESS(output)
  THROUGHTIME_ADDRESS(h)
  THROUGHTIME_ADDRESS(c)
  THROUGHTIME_ADDRESS(grad_output)
  THROUGHTIME_ADDRESS(grad_h)
  THROUGHTIME_ADDRESS(grad_c)
  THROUGHTIME_ADDRESS(grad_initial_h)
  THROUGHTIME_ADDRESS(grad_initial_c)
  THROUGHTIME_ADDRESS(grad_ih)
  THROUGHTIME_ADDRESS(grad_hh)
  THROUGHTIME_ADDRESS(h_in)
  THROUGHTIME_ADDRESS(extra)
  THROUGHTIME_ADDRESS(grad_hidden)
  THROUGHTIME_ADDRESS(sums)
#undef THROUGHTIME_ADDRESS
}

template <class T>
void bind_cotangents(nb::module_& module, const char* name, bool (*InstructionSet::*norms)(const Cotangents<T>&)) {
  module.def(
      name,
      [norms](int threads, bool reverse, long steps, long batch, long hidden, long gates, long losses, long lags,
              Address loss_steps, Address h_to_a, Address c_to_a, Address h_to_h, Address h_to_c, Address c_to_c,
              Address weight_hh, Address grad_output, Address out) {
        nb::gil_scoped_release release;
        check((active->*norms)({threads, reverse, steps, batch, hidden, gates, losses, lags,
                                at<const int64_t>(loss_steps), at<const T>(h_to_a), at<const T>(c_to_a),
                                at<const T>(h_to_h), at<const T>(h_to_c), at<const T>(c_to_c), at<const T>(weight_hh),
                                at<const T>(grad_output), at<T>(out)}));
      },
      "threads"_a, "reverse"_a, "steps"_a, "batch"_a, "hidden"_a, "gates"_a, "losses"_a, "lags"_a, "loss_steps"_a,
      "h_to_a"_a, "c_to_a"_a, "h_to_h"_a, "h_to_c"_a, "c_to_c"_a, "weight_hh"_a, "grad_output"_a, "norms"_a);
}

}  // namespace

NB_MODULE(_native, module) {
  active = instruction_sets().front();
  main_thread = nb::cast<unsigned long>(nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  module.def("instruction_sets", &names, "Instruction sets that this machine can run, the fastest first.");
  module.def("unbuilt_instruction_sets", &unbuilt_instruction_sets,
             "Faster ones that this machine could run, but the compiler didn't know.");
  module.def("instruction_set", [] { return std::string(active->name); }, "The one in use.");
  module.def("use_instruction_set", &use, "name"_a, "Use another one, in the whole process.");
  module.def("memory_use", [] {
    const MemoryUse use = memory_use();
    return std::make_tuple(use.used, use.idle);
  });
  module.def("release_memory", &release_memory);
  module.def("fill_blocks", &fill_blocks, "value"_a);
  module.def("use_own_threads", &use_own_threads, "value"_a);
  module.def("flush_denormals", &flush_denormals, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  module.def("restore_denormals", &restore_denormals, "threads"_a, "before"_a, nb::call_guard<nb::gil_scoped_release>());
  module.def("clear", [](uintptr_t array, long bytes, int threads) { clear(at<char>(array), bytes, threads); });
  module.def("plan_rows", [](Address lengths, long batch, long steps, Address order, Address rows, Address first_row,
                             Address index) {
    check(plan_rows(at<const int64_t>(lengths), batch, steps, at<int64_t>(order), at<int64_t>(rows),
                    at<int64_t>(first_row), at<int64_t>(index)));
  });
  bind<float>(module, "LayoutF32");
  bind<double>(module, "LayoutF64");
  bind<Bf16>(module, "LayoutBf16");
  bind_variant<float>(module, "VariantF32");
  bind_variant<double>(module, "VariantF64");
  bind_cotangents<float>(module, "cotangent_norms_f32", &InstructionSet::cotangent_norms_f32);
  bind_cotangents<double>(module, "cotangent_norms_f64", &InstructionSet::cotangent_norms_f64);
  bind_streams(module, &active);
}
