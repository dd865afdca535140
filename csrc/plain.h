// What the plain cells' loops have in common: from the product, whose panels hold a unit's gates side by side, to the new h nothing
// leaves the registers but what the backward pass reads.
#pragma once

#include "loop.h"

namespace throughtime::THROUGHTIME_ISA {

// Panels: how many gates' columns lie side by side, so that a unit's gates come out of one product together.
constexpr PanelShape joint_panels(int gates, long hidden) { return {gates, gates < 3 ? 4 / gates : 1, hidden}; }

template <class E>
struct PlainForwardBuffers {
  using T = Arithmetic<E>;
  Rows<E> h[2], m;  // what products take
  Rows<T> state;    // h, where that is narrower
  Rows<T> c;

  PlainForwardBuffers(const ForwardCall<E>& s, Memory& memory, long rows) {
    for (Rows<E>& buffer : h) buffer = memory.rows<E>(rows, s.width());
    if (s.projected || s.has_last()) m = memory.rows<E>(rows, s.hidden);
    if (is_narrow<E>) state = memory.rows<T>(rows, s.width());
    if (s.facts.has_c) c = memory.rows<T>(rows, s.hidden);
  }
};

// `Cell` is the page that says the facts, `Own` its loop.
template <class E, class Cell, class Own>
class PlainForward : public ForwardLoop<E, Own> {
 public:
  using Loop = ForwardLoop<E, Own>;
  using T = Arithmetic<E>;
  using V = Vector<T>;
  using Buffers = PlainForwardBuffers<E>;

  PlainForward(const ForwardCall<E>& s, Division division, long member, Barrier* barrier, Memory memory, long rows)
      : Loop(s, division, member, barrier), buffers_(s, memory, rows), own_h_(Loop::units(plain_panels(s.width()))),
        own_c_(Loop::units(panels())) {}

 protected:
  friend Loop;
  using Loop::column, Loop::packed_row, Loop::output_row, Loop::s_;
  static constexpr Facts facts = Cell::facts;
  static constexpr long G = facts.gates, W = lanes<T>;

  PanelShape panels() const { return joint_panels(facts.joint, s_.hidden); }

  void begin_step(long i) {
    now_ = buffers_.h[i % 2];
    next_ = buffers_.h[1 - i % 2];
  }

  template <class State>
  void enter(long row, const State* h, const State* c) {
    Loop::copy(now_.at(row), h + column(row) * s_.width(), own_h_);
    if constexpr (is_narrow<E>) Loop::copy(buffers_.state.at(row), h + column(row) * s_.width(), own_h_);
    if constexpr (facts.has_c) Loop::copy(buffers_.c.at(row), c + column(row) * s_.hidden, own_c_);
  }

  void leave(long row) {
    Loop::copy(s_.h + column(row) * s_.width(), state(next_, row), own_h_);
    if constexpr (facts.has_c) Loop::copy(s_.c + column(row) * s_.hidden, buffers_.c.at(row), own_c_);
  }

  // h at full width, of which `h` is what the products take.
  const T* state(Rows<E> h, long row) const {
    if constexpr (is_narrow<E>)
      return buffers_.state.at(row);
    else
      return h.at(row);
  }

  // A step's rows: W_ih x, what is saved, and h before and after.
  struct Step {
    Places<T> x;
    Places<E> gates, kept, output;  // each may be null
    Rows<E> now, next;
    Rows<T> state;
    long width;

    THROUGHTIME_INLINE V h_before(long row, long unit) const {
      if constexpr (is_narrow<E>)
        return load(state.at(row) + unit);
      else
        return load(now.at(row) + unit);
    }

    THROUGHTIME_INLINE void put_h(long row, long unit, V h) const {
      store(next.at(row) + unit, h);
      if constexpr (is_narrow<E>) store(state.at(row) + unit, h);
      if (output.first) store(output.at(row) + unit, h, width - unit);
    }
  };

  Step rows_of(long t) const {
    const long wide = G * s_.hidden;
    const Places<T> of_ids{s_.x, wide, s_.ids + packed_row(t, 0), Loop::groups_};
    return {s_.ids ? of_ids : Loop::packed_places(s_.x, t, s_.first_kept_row, wide),
            s_.gates ? Loop::packed_places(s_.gates, t, s_.first_kept_row, wide) : Places<E>{},
            s_.kept ? Loop::packed_places(s_.kept, t, s_.first_kept_row, s_.hidden) : Places<E>{},
            s_.output ? Loop::output_places(s_.output, t, s_.output_stride) : Places<E>{},
            now_,
            next_,
            buffers_.state,
            s_.width()};
  }

  // The packed bias has three parts: what starts the product, what is added to it, and the last gate's.
  const T* added_bias() const { return s_.bias + packed_size<T>(panels(), 1); }
  const T* last_bias() const { return s_.bias + 2 * packed_size<T>(panels(), 1); }

  // done(row, first unit, tile of W_hh h with its bias, bias to be added), for the joint gates of a panel's units.
  template <class Done>
  THROUGHTIME_INLINE void joint_product(long count, Done done) const {
    constexpr int vectors = facts.joint < 3 ? 4 : facts.joint;
    const T* bias = added_bias();
    Loop::template product<vectors>(panels(), s_.weight_hh, s_.bias, now_, s_.width(), count,
                                    [&](long row, long first, const T* tile) __attribute__((always_inline)) {
                                      done(row, first, tile, bias + first * facts.joint);
                                    });
  }

  const Buffers buffers_;
  const Range own_h_, own_c_;
  Rows<E> now_, next_;
};

template <class E>
struct PlainBackwardBuffers {
  using T = Arithmetic<E>;
  Rows<T> dh, dc;
  Rows<E> da[2], da_last, projected_dh;  // what products take

  PlainBackwardBuffers(const BackwardCall<E>& s, Memory& memory, long rows) {
    dh = memory.rows<T>(rows, s.width());
    if (s.facts.has_c) dc = memory.rows<T>(rows, s.hidden);
    for (Rows<E>& buffer : da) buffer = memory.rows<E>(rows, s.joint() * s.hidden);
    if (s.has_last()) da_last = memory.rows<E>(rows, s.hidden);
    if (s.projected) projected_dh = memory.rows<E>(rows, s.projected);
  }
};

template <class E, class Cell, class Own>
class PlainBackward : public BackwardLoop<E, Own, Cell::facts.has_c> {
 public:
  using Loop = BackwardLoop<E, Own, Cell::facts.has_c>;
  using T = Arithmetic<E>;
  using V = Vector<T>;
  using Buffers = PlainBackwardBuffers<E>;

  PlainBackward(const BackwardCall<E>& s, Division division, long member, Barrier* barrier, Memory memory, long rows)
      : PlainBackward(s, division, member, barrier, Buffers(s, memory, rows)) {}

 protected:
  friend Loop;
  using Loop::s_, Loop::dh_, Loop::own_, Loop::own_h_, Loop::grad_row, Loop::row_of;
  static constexpr Facts facts = Cell::facts;
  static constexpr long G = facts.gates, W = lanes<T>;

  const E* gates(long t, long row) const { return s_.gates + row_of(t, row) * G * s_.hidden; }

  void begin_step(long i) { da_ = buffers_.da[i % 2]; }

  void step(long t, long count) {
    if (s_.h_in)
      for (long row = 0; row < count; ++row)
        Loop::copy(s_.h_in + grad_row(t, row) * s_.width(), Loop::h_before(t, row), own_h_);
    static_cast<Own&>(*this).step_cell(t, count);
  }

  // What reaches h_t: from later steps, and from the step's own loss.
  V reaching(long row, long unit, const E* own_loss) const {
    const V dh = load(dh_.at(row) + unit);
    return own_loss ? dh + load(own_loss + unit, s_.width() - unit) : dh;
  }

  // done(unit, H - unit) for each vector of the member's units.
  template <class Done>
  THROUGHTIME_INLINE void each_unit(Done done) const {
    for (long unit = own_.begin; unit < own_.end; unit += W) done(unit, s_.hidden - unit);
  }

  // dh = what went past the weights, if anything, + W_hh^T da.
  void through_weights(long count, bool has_bypass) {
    Loop::meet();
    Loop::unit_product(s_.width(), s_.weight_hh, nullptr, da_, facts.joint * s_.hidden, count, [&](long row, long unit, V through) {
      T* dh = dh_.at(row) + unit;
      store(dh, has_bypass ? load(dh) + through : through);
    });
  }

  const Buffers buffers_;
  Rows<E> da_;

 private:
  PlainBackward(const BackwardCall<E>& s, Division division, long member, Barrier* barrier, const Buffers& buffers)
      : Loop(s, division, member, barrier, buffers.dh, buffers.dc), buffers_(buffers) {}
};

}  // namespace throughtime::THROUGHTIME_ISA
