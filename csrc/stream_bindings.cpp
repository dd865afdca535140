// A model's packed weights, and an engine that owns the states of some streams. Arrays come as addresses, which
// streaming/engine.py has checked; a plain step takes NumPy's arrays as they are, since that is all its cost in Python.
#include "stream_bindings.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "choice.h"
#include "denormals.h"
#include "dispatch.h"
#include "fork.h"
#include "memory.h"
#include "signals.h"
#include "stream.h"
#include "threads.h"

namespace throughtime {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using Address = uintptr_t;

const InstructionSet* const* active_set = nullptr;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The number of a name among some.
template <class E, size_t count>
E named(const std::string& name, const char* const (&names)[count]) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw std::invalid_argument("there is no " + name);
  return static_cast<E>(found - std::begin(names));
}

// Vectors and rows are padded with zeros to this many floats, which are whole panels of every instruction set.
constexpr long line = 64;
long padded(long count) { return (count + line - 1) / line * line + line; }

class Weights {
 public:
  explicit Weights(const std::string& precision) : set_(**active_set), kernels_(stream_kernels_of(set_)) {
    model_.precision = named<Precision>(precision, precision_names);
  }
  Weights(const Weights&) = delete;

  void add_linear(Address weight, Address bias, long output, long input) {
    Stage s{};
    s.kind = StageKind::linear;
    s.input = input;
    s.hidden = output;
    s.weight_ih = pack(weight, output, input);
    s.bias_ih = bias ? copy(bias, output) : nullptr;
    add(s);
  }

  // W_ih is left out where a table holds its products.
  void add_recurrent(const std::string& cell, long input, long hidden, long projected, bool is_variant, bool is_coupled,
                     Address weight_ih, Address weight_hh, Address weight_hr, Address bias_ih, Address bias_hh,
                     Address weight_ch, Address gain_ih, Address gain_hh, Address gain_c, Address shift_c, float kept_h,
                     float kept_c) {
    Stage s{};
    s.kind = named<StageKind>(cell, stage_names);
    s.facts = facts(cell);
    s.input = input;
    s.hidden = hidden;
    s.projected = projected;
    s.is_variant = is_variant;
    s.is_coupled = is_coupled;
    s.kept_h = kept_h;
    s.kept_c = kept_c;
    const long rows = s.gates() * hidden;
    if (weight_ih) s.weight_ih = pack(weight_ih, rows, input);
    s.weight_hh = pack(weight_hh, s.joint() * hidden, s.width());
    if (s.has_last()) s.weight_n = pack(weight_hh + s.joint() * hidden * hidden * sizeof(float), hidden, hidden);
    if (projected) s.weight_hr = pack(weight_hr, projected, hidden);
    s.bias_ih = copy(bias_ih, rows);
    s.bias_hh = optional(bias_hh, rows);
    if (s.has_last() && bias_ih && bias_hh) s.bias_n = sum(s.bias_ih + rows - hidden, s.bias_hh + rows - hidden, hidden);
    s.weight_ch = optional(weight_ch, rows - hidden);
    s.gain_ih = optional(gain_ih, rows);
    s.gain_hh = optional(gain_hh, rows);
    s.gain_c = optional(gain_c, hidden);
    s.shift_c = optional(shift_c, hidden);
    s.h_at = model_.state_stride;
    s.c_at = s.h_at + (s.width() + 15) / 16 * 16;
    model_.state_stride = s.c_at + (s.facts.has_c ? (hidden + 15) / 16 * 16 : 0);
    state_size_ += s.width() + (s.facts.has_c ? hidden : 0);
    add(s);
    model_.readout = model_.count;
  }

  // Rows (count, width) that ids choose: what the first stage reads, or what its product with W_ih would be.
  void set_table(Address rows, long count, long width, bool is_product) {
    model_.table_stride = padded(width);
    float* const table = take<float>(count * model_.table_stride);
    for (long row = 0; row < count; ++row)
      memcpy(table + row * model_.table_stride, at<const float>(rows) + row * width, width * sizeof(float));
    model_.table = table;
    model_.table_is_product = is_product;
    vocabulary_ = count;
  }

  // out (rows, O) of the first stage, which is linear; several times over for measurements.
  void multiply(long rows, Address x, Address out, long times) const {
    const nb::gil_scoped_release release;
    const FlushDenormals flush;
    Block scratch = new_scratch();
    char* const memory = scratch.take<char>(kernels_.scratch_bytes(model()));
    const Stage& s = stages_.front();
    for (long i = 0; i < times; ++i)
      kernels_.multiply(model(), s.weight_ih, s.bias_ih, rows, at<const float>(x), at<float>(out), s.hidden, memory);
  }

  Block new_scratch() const {
    const long bytes = kernels_.scratch_bytes(model());
    Block block(Block::bytes<char>(bytes));
    if (!block.is_there()) throw std::bad_alloc();
    return block;
  }

  const StreamModel& model() const { return model_; }
  const StreamKernels& kernels() const { return kernels_; }
  const std::vector<Stage>& stages() const { return stages_; }
  long vocabulary() const { return vocabulary_; }
  long state_size() const { return state_size_; }  // numbers that a stream's state has
  long products() const { return products_; }      // multiplications in a step of one stream, nearly

  long bytes() const { return bytes_; }

 private:
  template <class T>
  T* take(long count) {
    blocks_.emplace_back(Block::bytes<T>(count));
    if (!blocks_.back().is_there()) throw std::bad_alloc();
    T* const it = blocks_.back().take<T>(count);
    memset(it, 0, count * sizeof(T));
    bytes_ += count * sizeof(T);
    return it;
  }

  const float* copy(Address from, long count) {
    float* const to = take<float>(padded(count));
    if (from) memcpy(to, at<const float>(from), count * sizeof(float));
    return to;
  }
  const float* optional(Address from, long count) { return from ? copy(from, count) : nullptr; }

  const float* sum(const float* a, const float* b, long count) {
    float* const to = take<float>(padded(count));
    for (long j = 0; j < count; ++j) to[j] = a[j] + b[j];
    return to;
  }

  const Facts& facts(const std::string& cell) const {
    const Facts* const end = set_.cells + set_.cell_count;
    const Facts* const found = std::find_if(set_.cells, end, [&](const Facts& it) { return it.name == cell; });
    if (found == end) throw std::invalid_argument(cell + " is no cell");
    return *found;
  }

  Matrix pack(Address source, long columns, long depth) {
    if (model_.precision == Precision::int8 && depth > deepest_int8)
      throw std::invalid_argument("a product of int8 sums at most " + std::to_string(deepest_int8) +
                                  " numbers exactly, and a layer reads " + std::to_string(depth) +
                                  "; expected precision='bfloat16' or 'float32'");
    products_ += columns * depth;
    Matrix w;
    w.columns = columns;
    w.depth = depth;
    char* const packed = take<char>(kernels_.packed_bytes(model_.precision, columns, depth));
    float* scale = nullptr;
    int32_t* offset = nullptr;
    if (model_.precision == Precision::int8) scale = take<float>(padded(columns)), offset = take<int32_t>(padded(columns));
    kernels_.pack(model_.precision, columns, depth, at<const float>(source), packed, scale, offset);
    w.packed = packed;
    w.scale = scale;
    w.offset = offset;
    return w;
  }

  void add(const Stage& stage) {
    stages_.push_back(stage);
    model_.stages = stages_.data();
    model_.count = static_cast<int>(stages_.size());
  }

  const InstructionSet& set_;
  const StreamKernels& kernels_;
  StreamModel model_{};
  std::vector<Stage> stages_;
  std::vector<Block> blocks_;
  long vocabulary_ = 0, state_size_ = 0, products_ = 0, bytes_ = 0;
};

// An array as Python hands it over: without gaps and of numbers of a kind, else it has none.
template <class T>
class Buffer {
 public:
  explicit Buffer(nb::handle array) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (std::is_const_v<T> ? 0 : PyBUF_WRITABLE);
    is_held_ = PyObject_GetBuffer(array.ptr(), &view_, flags) == 0;
    if (!is_held_) PyErr_Clear();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (is_held_) PyBuffer_Release(&view_);
  }

  // -1 of what is no such array.
  long count() const {
    const bool is_one = is_held_ && view_.format && !strcmp(view_.format, format());
    return is_one ? static_cast<long>(view_.len / sizeof(T)) : -1;
  }
  T* data() const { return static_cast<T*>(view_.buf); }

 private:
  static constexpr const char* format() {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, const float>) return "f";
    if constexpr (std::is_same_v<T, const double>) return "d";
    if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, const int64_t>) return "l";
    if constexpr (std::is_same_v<T, const bool>) return "?";
  }

  Py_buffer view_;
  bool is_held_ = false;
};

void check_count(const char* name, long count, long expected) {
  if (count == expected) return;
  const std::string given = count < 0 ? "are of another kind" : "are " + std::to_string(count);
  throw std::invalid_argument(std::string(name) + " " + given + "; expected " + std::to_string(expected) + " of them");
}

// What the states of so many streams take, and a byte for each beside them.
size_t bytes_of(long streams, long stride) {
  constexpr long most = 1L << 58;  // floats: more than any memory, and few enough to be counted in bytes
  if (streams > most / std::max(1L, stride)) throw std::bad_alloc();
  return Block::bytes<float>(streams * stride) + Block::bytes<uint8_t>(streams);
}

class Engine {
 public:
  Engine(std::shared_ptr<const Weights> weights, long streams, int threads)
      : weights_(std::move(weights)), streams_(streams), threads_(threads), stride_(weights_->model().state_stride),
        block_(bytes_of(streams, stride_)) {
    if (weights_->stages().empty()) throw std::invalid_argument("there are no layers to step");
    if (!block_.is_there()) throw std::bad_alloc();
    states_ = block_.take<float>(streams * stride_);
    taken_ = block_.take<uint8_t>(streams);
    memset(states_, 0, streams * stride_ * sizeof(float));
    memset(taken_, 0, streams);
    const long members = std::min<long>(threads, blocks(streams));
    const long bytes = weights_->kernels().scratch_bytes(weights_->model());
    for (long member = 0; member < members; ++member) {
      scratch_.push_back(weights_->new_scratch());
      parts_.push_back(scratch_.back().take<char>(bytes));
      memset(parts_.back(), 0, bytes);
    }
  }

  std::unique_ptr<Engine> clone() const {
    const nb::gil_scoped_release release;
    auto twin = std::make_unique<Engine>(weights_, streams_, threads_);
    const Turn turn(*this);
    memcpy(twin->states_, states_, streams_ * stride_ * sizeof(float));
    return twin;
  }

  // One step of all streams, x (streams, I) to out (streams, O); false where an array isn't as it must be.
  bool step(nb::handle x, nb::handle out) {
    const StreamModel& model = weights_->model();
    if (model.table) return false;
    const Buffer<const float> from(x);
    const Buffer<float> to(out);
    if (from.count() != streams_ * model.input() || to.count() != streams_ * model.output()) return false;
    run({1, streams_, nullptr, states_, from.data(), nullptr, to.data(), false});
    return true;
  }

  // The same of a single stream that reads token ids.
  bool step_id(int64_t id, nb::handle out) {
    const StreamModel& model = weights_->model();
    if (!model.table || streams_ != 1 || id < 0 || id >= weights_->vocabulary()) return false;
    const Buffer<float> to(out);
    if (to.count() != model.output()) return false;
    run({1, 1, nullptr, states_, nullptr, &id, to.data(), false});
    return true;
  }

  // T steps of `rows` streams: of those in `which`, or of all.
  void feed(long steps, long rows, Address which, Address x, Address ids, Address out, bool last_only) {
    const StreamCall call{steps, rows, at<const int64_t>(which), states_, at<const float>(x), at<const int64_t>(ids),
                          at<float>(out), last_only};
    if (weights_->model().table ? !ids : !x) throw std::invalid_argument("expected what the first layer reads: x, or token ids");
    if (!run(call)) throw nb::python_error();
  }

  // Let the one stream, whose logits `choice` holds, write up to as many tokens as there are chances: each is chosen, and read.
  // Returns how many they were, fewer where `end` was chosen or none is left; and whether a logit was no number, which ends it too.
  std::tuple<long, bool> write(Choice& choice, nb::handle chances, nb::handle forbidden, int64_t end, nb::handle tokens) {
    const Buffer<const double> by_chance(chances);
    const Buffer<const bool> without(forbidden);
    const Buffer<int64_t> to(tokens);
    const long count = to.count(), vocabulary = weights_->vocabulary();
    if (streams_ != 1 || !weights_->model().table) throw std::invalid_argument("a writer is one stream that reads token ids");
    check_count("outputs", weights_->model().output(), vocabulary);
    check_count("tokens to choose from", choice.vocabulary(), vocabulary);
    check_count("forbidden tokens", without.count(), vocabulary);
    check_count("chances", by_chance.count(), count);
    const nb::gil_scoped_release release;
    const Turn turn(*this);
    for (long i = 0; i < count; ++i) {
      const int64_t token = choice.choose(reinterpret_cast<const uint8_t*>(without.data()), by_chance.data()[i]);
      if (token == Choice::no_number) return {i, true};
      if (token == Choice::none_left || token == end) return {i, false};
      to.data()[i] = token;
      choice.see(token);
      step_all({1, 1, nullptr, states_, nullptr, &token, choice.logits.data(), false});
    }
    return {count, false};
  }

  // States one after the other, each (h, c of an LSTM) of every layer, without gaps.
  void read_states(Address which, long count, Address to) {
    each_state(which, count, [to = at<float>(to)](float* state, long length, long place) {
      memcpy(to + place, state, length * sizeof(float));
    });
  }
  void write_states(Address which, long count, Address from) {
    each_state(which, count, [from = at<const float>(from)](float* state, long length, long place) {
      memcpy(state, from + place, length * sizeof(float));
    });
  }
  void reset(Address which, long count) {
    each_state(which, count, [](float* state, long length, long) { memset(state, 0, length * sizeof(float)); });
  }

  long state_size() const { return weights_->state_size(); }

  // Bytes of the weights, of what all streams share beside them, and of each stream.
  std::tuple<long, long, long> memory() const {
    const long shared = static_cast<long>(parts_.size()) * weights_->kernels().scratch_bytes(weights_->model());
    return {weights_->bytes(), shared, stride_ * static_cast<long>(sizeof(float)) + 1};
  }

 private:
  long blocks(long rows) const {
    const long least = (rows + most_positions - 1) / most_positions;
    constexpr long worth_a_thread = 8;  // rows
    return std::max(least, std::min<long>(threads_, rows / worth_a_thread));
  }

  // The right to the states: calls of several threads come one after the other. Between two parts of a long call other threads
  // still wait, but not the calling one, which may come in again from a signal's handler; nor a fork.
  class Turn {
   public:
    explicit Turn(const Engine& engine) : engine_(engine), lock_(engine.mutex_) {
      engine.left_.wait(lock_, [&] { return engine.owner_ == std::thread::id() || engine.owner_ == own_; });
    }
    Turn(const Turn&) = delete;
    ~Turn() {
      if (!has_paused_) return;
      lock_.unlock();
      engine_.left_.notify_all();
    }

    // Let a handler or a fork come in between; return whether a handler has raised.
    bool pause(IsInterrupted is_interrupted) {
      const std::thread::id before = std::exchange(engine_.owner_, own_);
      has_paused_ = true;
      lock_.unlock();
      const bool has_raised = is_interrupted();
      while (is_forking()) std::this_thread::yield();
      lock_.lock();
      engine_.owner_ = before;
      return has_raised;
    }

   private:
    const std::thread::id own_ = std::this_thread::get_id();
    const Engine& engine_;
    std::unique_lock<std::mutex> lock_;
    bool has_paused_ = false;
  };

  // After a fork. The child lacks the threads that wait here, and the one that has paused, if it isn't the one that forked.
  void let_go(bool is_child) {
    if (is_child) {
      new (&left_) std::condition_variable;
      if (owner_ != std::this_thread::get_id()) owner_ = std::thread::id();
    }
    mutex_.unlock();
  }

  // Returns false where a signal's handler has raised: then some of the steps have been made.
  bool run(const StreamCall& call) {
    constexpr long work_a_part = 1L << 31;  // multiplications: a tenth of a second
    const IsInterrupted is_interrupted = interruption();
    const nb::gil_scoped_release release;
    Turn turn(*this);
    if (call.ids) check_ids(call.ids, call.steps * call.rows);
    if (call.which) check_which(call.which, call.rows);
    const long most = std::max(1L, work_a_part / std::max(1L, call.rows * weights_->products()));
    for (long t = 0; t < call.steps; t += most) {
      if (t && turn.pause(is_interrupted)) return false;
      step_all(part(call, t, std::min(most, call.steps - t)));
    }
    return true;
  }

  // Some of a call's steps.
  StreamCall part(StreamCall call, long first, long steps) const {
    const StreamModel& model = weights_->model();
    call.steps = steps;
    if (call.x) call.x += first * call.rows * model.input();
    if (call.ids) call.ids += first * call.rows;
    if (!call.last_only) call.out += first * call.rows * model.output();
    return call;
  }

  void step_all(const StreamCall& call) const {
    struct Task {
      const Engine& engine;
      const StreamCall& call;
      long count;
    } task{*this, call, blocks(call.rows)};
    const auto body = [](void* context, long number, int member) {
      const auto& [engine, call, count] = *static_cast<const Task*>(context);
      const long first = call.rows * number / count;
      engine.weights_->kernels().step(engine.weights_->model(), call, first, call.rows * (number + 1) / count - first,
                                     engine.parts_[member]);
    };
    run_tasks(static_cast<int>(parts_.size()), task.count, body, &task);
  }

  void check_ids(const int64_t* ids, long count) const {
    for (long i = 0; i < count; ++i)
      if (ids[i] < 0 || ids[i] >= weights_->vocabulary())
        throw nb::index_error(("token id " + std::to_string(ids[i]) + "; expected one from 0 to " +
                               std::to_string(weights_->vocabulary() - 1))
                                  .c_str());
  }

  // Each is one of ours, and none comes twice.
  void check_which(const int64_t* which, long count) {
    long i = 0;
    bool is_foreign = false;
    for (; i < count; ++i) {
      is_foreign = which[i] < 0 || which[i] >= streams_;
      if (is_foreign || taken_[which[i]]) break;
      taken_[which[i]] = 1;
    }
    for (long j = 0; j < i; ++j) taken_[which[j]] = 0;
    if (i == count) return;
    const std::string it = "which[" + std::to_string(i) + "] = " + std::to_string(which[i]);
    if (is_foreign) throw std::out_of_range(it + "; expected a stream from 0 to " + std::to_string(streams_ - 1));
    throw std::invalid_argument(it + " is there twice; expected each stream once");
  }

  template <class Do>
  void each_state(Address which, long count, Do visit) {
    const nb::gil_scoped_release release;
    const Turn turn(*this);
    const int64_t* const of = at<const int64_t>(which);
    if (of) check_which(of, count);
    long place = 0;
    for (long i = 0; i < count; ++i) {
      float* const state = states_ + (of ? of[i] : i) * stride_;
      for (const Stage& s : weights_->stages()) {
        if (!s.is_recurrent()) continue;
        visit(state + s.h_at, s.width(), place);
        place += s.width();
        if (!s.facts.has_c) continue;
        visit(state + s.c_at, s.hidden, place);
        place += s.hidden;
      }
    }
  }

  const std::shared_ptr<const Weights> weights_;
  const long streams_;
  const int threads_;
  const long stride_;
  Block block_;
  float* states_;
  uint8_t* taken_;
  std::vector<Block> scratch_;
  std::vector<char*> parts_;
  mutable std::mutex mutex_;  // held while the states are read or written
  mutable std::thread::id owner_;  // whose call it is between two of its parts, when nobody else holds it
  mutable std::condition_variable left_;
  const AtFork at_fork_{this, [](void* it) { static_cast<Engine*>(it)->mutex_.lock(); },
                        [](void* it, bool is_child) { static_cast<Engine*>(it)->let_go(is_child); }};
};

}  // namespace

void bind_streams(nb::module_& module, const InstructionSet* const* active) {
  active_set = active;
  module.def("precisions", [] { return std::vector<std::string>(std::begin(precision_names), std::end(precision_names)); });
  const nb::call_guard<nb::gil_scoped_release> without_gil;
  nb::class_<Weights>(module, "StreamWeights")
      .def(nb::init<const std::string&>(), "precision"_a)
      .def("add_linear", &Weights::add_linear, "weight"_a, "bias"_a, "output"_a, "input"_a, without_gil)
      .def("add_recurrent", &Weights::add_recurrent, "cell"_a, nb::kw_only(), "input"_a, "hidden"_a, "projected"_a,
           "is_variant"_a, "is_coupled"_a, "weight_ih"_a, "weight_hh"_a, "weight_hr"_a, "bias_ih"_a, "bias_hh"_a,
           "weight_ch"_a, "gain_ih"_a, "gain_hh"_a, "gain_c"_a, "shift_c"_a, "kept_h"_a, "kept_c"_a, without_gil)
      .def("set_table", &Weights::set_table, "rows"_a, "count"_a, "width"_a, "is_product"_a, without_gil)
      .def("multiply", &Weights::multiply, "rows"_a, "x"_a, "out"_a, "times"_a = 1)
      .def_prop_ro("bytes", &Weights::bytes);
  nb::class_<Choice>(module, "Choice")
      .def("__init__",
           [](Choice* it, long vocabulary, double temperature, long top_k, double top_p, double min_p, double typical_p,
              double repetition_penalty, long no_repeat_ngram, bool greedy) {
             new (it) Choice(vocabulary, {temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
                                          no_repeat_ngram, greedy});
           },
           "vocabulary"_a, nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "typical_p"_a,
           "repetition_penalty"_a, "no_repeat_ngram"_a, "greedy"_a)
      .def(
          "see",
          [](Choice& c, nb::handle tokens, long more) {
            const Buffer<const int64_t> from(tokens);
            if (from.count() < 0) throw std::invalid_argument("tokens are of another kind; expected int64");
            c.see(from.data(), from.count(), more);
          },
          "tokens"_a, "more"_a = 0)
      .def(
          "choose",
          [](Choice& c, nb::handle forbidden, double chance) {
            const Buffer<const bool> without(forbidden);
            check_count("forbidden tokens", without.count(), c.vocabulary());
            return c.choose(reinterpret_cast<const uint8_t*>(without.data()), chance);
          },
          "forbidden"_a, "chance"_a)
      .def(
          "take",
          [](Choice& c, nb::handle logits) {
            const Buffer<const float> from(logits);
            check_count("logits", from.count(), c.vocabulary());
            memcpy(c.logits.data(), from.data(), from.count() * sizeof(float));
          },
          "logits"_a);
  nb::class_<Engine>(module, "StreamEngine")
      .def(nb::init<std::shared_ptr<Weights>, long, int>(), "weights"_a, "streams"_a, "threads"_a, without_gil)
      .def("clone", &Engine::clone)
      .def("step", &Engine::step, "x"_a, "out"_a)
      .def("step_id", &Engine::step_id, "id"_a, "out"_a)
      .def("feed", &Engine::feed, "steps"_a, "rows"_a, "which"_a, "x"_a, "ids"_a, "out"_a, "last_only"_a)
      .def("write", &Engine::write, "choice"_a, "chances"_a, "forbidden"_a, "end"_a, "tokens"_a)
      .def("read_states", &Engine::read_states, "which"_a, "count"_a, "to"_a)
      .def("write_states", &Engine::write_states, "which"_a, "count"_a, "from"_a)
      .def("reset", &Engine::reset, "which"_a, "count"_a)
      .def_prop_ro("state_size", &Engine::state_size)
      .def("memory", &Engine::memory);
}

}  // namespace throughtime
