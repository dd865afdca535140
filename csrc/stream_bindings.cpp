// A model's packed weights, and an engine that owns the states of some streams. Arrays come as addresses, which
// streaming/engine.py has checked; a plain step takes NumPy's arrays as they are, since that is all its cost in Python.
#include "stream_bindings.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "choice.h"
#include "dispatch.h"
#include "memory.h"
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

// Vectors and rows are padded with zeros to this many floats, which are whole panels of every instruction set.
constexpr long line = 64;
long padded(long count) { return (count + line - 1) / line * line + line; }

class Weights {
 public:
  explicit Weights(int precision) : kernels_(stream_kernels_of(**active_set)) {
    model_.precision = static_cast<Precision>(precision);
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
  void add_recurrent(int kind, long input, long hidden, long projected, bool is_variant, bool is_coupled,
                     Address weight_ih, Address weight_hh, Address weight_hr, Address bias_ih, Address bias_hh,
                     Address bias_n, Address weight_ch, Address gain_ih, Address gain_hh, Address gain_c,
                     Address shift_c, float kept_h, float kept_c) {
    Stage s{};
    s.kind = static_cast<StageKind>(kind);
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
    s.bias_n = optional(bias_n, hidden);
    s.weight_ch = optional(weight_ch, rows - hidden);
    s.gain_ih = optional(gain_ih, rows);
    s.gain_hh = optional(gain_hh, rows);
    s.gain_c = optional(gain_c, hidden);
    s.shift_c = optional(shift_c, hidden);
    s.h_at = model_.state_floats;
    s.c_at = s.h_at + (s.width() + 15) / 16 * 16;
    model_.state_floats = s.c_at + (s.kind == StageKind::lstm ? (hidden + 15) / 16 * 16 : 0);
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

  Matrix pack(Address source, long columns, long depth) {
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

  const StreamKernels& kernels_;
  StreamModel model_{};
  std::vector<Stage> stages_;
  std::vector<Block> blocks_;
  long vocabulary_ = 0, bytes_ = 0;
};

// An array of floats or ids as Python hands it over, without gaps and of the expected size; else it isn't there.
class Buffer {
 public:
  Buffer(nb::handle array, const char* format, long bytes, bool is_written) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (is_written ? PyBUF_WRITABLE : 0);
    is_held_ = PyObject_GetBuffer(array.ptr(), &view_, flags) == 0;
    if (!is_held_) PyErr_Clear();
    is_there_ = is_held_ && view_.len == bytes && view_.format && !strcmp(view_.format, format);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (is_held_) PyBuffer_Release(&view_);
  }

  bool is_there() const { return is_there_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  Py_buffer view_;
  bool is_held_ = false, is_there_ = false;
};

class Engine {
 public:
  Engine(std::shared_ptr<const Weights> weights, long streams, int threads)
      : weights_(std::move(weights)), streams_(streams), threads_(threads), stride_(weights_->model().state_floats),
        block_(Block::bytes<float>(streams * stride_) + Block::bytes<uint8_t>(streams)) {
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
    auto twin = std::make_unique<Engine>(weights_, streams_, threads_);
    const nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    memcpy(twin->states_, states_, streams_ * stride_ * sizeof(float));
    return twin;
  }

  // One step of all streams, x (streams, I) to out (streams, O); false where an array isn't as it must be.
  bool step(nb::handle x, nb::handle out) {
    const StreamModel& model = weights_->model();
    if (model.table) return false;
    const Buffer from(x, "f", streams_ * model.input() * sizeof(float), false);
    const Buffer to(out, "f", streams_ * model.output() * sizeof(float), true);
    if (!from.is_there() || !to.is_there()) return false;
    run({1, streams_, nullptr, states_, from.as<const float>(), nullptr, to.as<float>(), false});
    return true;
  }

  // The same of a single stream that reads token ids.
  bool step_id(int64_t id, nb::handle out) {
    const StreamModel& model = weights_->model();
    if (!model.table || streams_ != 1 || id < 0 || id >= weights_->vocabulary()) return false;
    const Buffer to(out, "f", model.output() * sizeof(float), true);
    if (!to.is_there()) return false;
    run({1, 1, nullptr, states_, nullptr, &id, to.as<float>(), false});
    return true;
  }

  // T steps of `rows` streams: of those in `which`, or of all.
  void feed(long steps, long rows, Address which, Address x, Address ids, Address out, bool last_only) {
    if (ids) check_ids(at<const int64_t>(ids), steps * rows);
    run({steps, rows, at<const int64_t>(which), states_, at<const float>(x), at<const int64_t>(ids), at<float>(out),
         last_only});
  }

  // Let the one stream, whose logits `choice` holds, write up to `count` tokens: each is chosen, and read. Returns how many they were,
  // fewer where `end` was chosen or none is left; or -1 where a logit is no number.
  long write(Choice& choice, long count, Address chances, Address forbidden, int64_t end, Address tokens) {
    const nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t* const to = at<int64_t>(tokens);
    for (long i = 0; i < count; ++i) {
      const int64_t token = choice.choose(at<const uint8_t>(forbidden), chances ? at<const double>(chances)[i] : 0.0);
      if (token == Choice::no_number) return -1;
      if (token == Choice::none_left || token == end) return i;
      to[i] = token;
      choice.see(token);
      step_all({1, 1, nullptr, states_, nullptr, &token, choice.logits.data(), false});
    }
    return count;
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

  void run(const StreamCall& call) {
    const nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (call.which) check_which(call.which, call.rows);
    step_all(call);
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
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t* const of = at<const int64_t>(which);
    if (of) check_which(of, count);
    long place = 0;
    for (long i = 0; i < count; ++i) {
      float* const state = states_ + (of ? of[i] : i) * stride_;
      for (const Stage& s : weights_->stages()) {
        if (!s.is_recurrent()) continue;
        visit(state + s.h_at, s.width(), place);
        place += s.width();
        if (s.kind != StageKind::lstm) continue;
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
  mutable std::mutex mutex_;
};

}  // namespace

void bind_streams(nb::module_& module, const InstructionSet* const* active) {
  active_set = active;
  nb::class_<Weights>(module, "StreamWeights")
      .def(nb::init<int>(), "precision"_a)
      .def("add_linear", &Weights::add_linear, "weight"_a, "bias"_a, "output"_a, "input"_a)
      .def("add_recurrent", &Weights::add_recurrent, "kind"_a, "input"_a, "hidden"_a, "projected"_a, "is_variant"_a,
           "is_coupled"_a, "weight_ih"_a, "weight_hh"_a, "weight_hr"_a, "bias_ih"_a, "bias_hh"_a, "bias_n"_a,
           "weight_ch"_a, "gain_ih"_a, "gain_hh"_a, "gain_c"_a, "shift_c"_a, "kept_h"_a, "kept_c"_a)
      .def("set_table", &Weights::set_table, "rows"_a, "count"_a, "width"_a, "is_product"_a)
      .def("multiply", &Weights::multiply, "rows"_a, "x"_a, "out"_a, "times"_a = 1)
      .def_prop_ro("bytes", &Weights::bytes);
  nb::class_<Choice>(module, "Choice")
      .def("__init__",
           [](Choice* it, long vocabulary, double temperature, long top_k, double top_p, double min_p, double typical_p,
              double repetition_penalty, long no_repeat_ngram, bool greedy) {
             new (it) Choice(vocabulary, {temperature, top_k, top_p, min_p, typical_p, repetition_penalty,
                                          no_repeat_ngram, greedy});
           },
           "vocabulary"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "typical_p"_a, "repetition_penalty"_a,
           "no_repeat_ngram"_a, "greedy"_a)
      .def(
          "see", [](Choice& c, Address tokens, long count, long more) { c.see(at<const int64_t>(tokens), count, more); },
          "tokens"_a, "count"_a, "more"_a)
      .def("choose", [](Choice& c, Address forbidden, double chance) { return c.choose(at<const uint8_t>(forbidden), chance); },
           "forbidden"_a, "chance"_a)
      .def(
          "take",
          [](Choice& c, Address logits) { memcpy(c.logits.data(), at<const float>(logits), c.logits.size() * sizeof(float)); },
          "logits"_a);
  nb::class_<Engine>(module, "StreamEngine")
      .def(nb::init<std::shared_ptr<Weights>, long, int>(), "weights"_a, "streams"_a, "threads"_a)
      .def("clone", &Engine::clone)
      .def("step", &Engine::step, "x"_a, "out"_a)
      .def("step_id", &Engine::step_id, "id"_a, "out"_a)
      .def("feed", &Engine::feed, "steps"_a, "rows"_a, "which"_a, "x"_a, "ids"_a, "out"_a, "last_only"_a)
      .def("write", &Engine::write, "choice"_a, "count"_a, "chances"_a, "forbidden"_a, "end"_a, "tokens"_a)
      .def("read_states", &Engine::read_states, "which"_a, "count"_a, "to"_a)
      .def("write_states", &Engine::write_states, "which"_a, "count"_a, "from"_a)
      .def("reset", &Engine::reset, "which"_a, "count"_a)
      .def("memory", &Engine::memory);
}

}  // namespace throughtime
